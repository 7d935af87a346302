"""The communicator: one small interface, three back ends.

``threads.py`` runs ranks as threads of one process, ``c10d.py`` as processes of ``torch.distributed``, and
``ledger.py`` plays one rank alone; ``collectives.py`` has what they share. Nothing in this package's
communicators is differentiable.

Objects travel as JSON text, in every back end: nothing is ever unpickled, and what cannot travel between
processes does not travel between threads either.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Pending:
    """A collective under way; its tensors belong to it until ``wait``."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """The result; a second call gives it again."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        assert self._result is not None  # noqa: S101 - an error of ``finish`` leaves it in place
        return self._result


class Transfer:
    """Tensors on their way between ranks; they belong to it until ``wait``."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self._finish: Callable[[], object] | None = finish

    def wait(self) -> None:
        """Until what we receive is here and what we send may be reused; a second call does nothing."""
        if self._finish is not None:
            self._finish()
            self._finish = None


@runtime_checkable
class Comm(Protocol):
    """A group of ranks that compute together.

    Members call the same collectives in the same order; a transfer concerns only those at its ends. Inputs
    may be of any strides. The ``start_`` forms return at once; neither input nor output may be touched before
    ``wait``. With one rank, results may share memory with inputs.

    Attributes:
        rank: our place in this group.
        size: number of ranks.
        ranks: world ranks of the members, in group order.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank gets the same bits."""
        ...

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """[*shape] of every rank -> [size, *shape], in rank order.

        Args:
            tensor: of the same shape on all ranks.
            out: filled where given, and what the result is a view of: contiguous, size * numel elements.
        """
        ...

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """[size, *shape] -> [*shape]: row ``rank``, summed over ranks."""
        ...

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """[size, *shape] -> [size, *shape]: row i goes to rank i, and row j of the result is from rank j."""
        ...

    def all_to_all_v(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """[sum(send), *shape] -> [sum(receive), *shape]: ``send[i]`` rows, in order, go to rank i.

        ``receive[j]`` rows come from rank j, what that rank sends here; in rank order. Our own part does not
        travel, nor do empty ones.
        """
        ...

    def start_all_to_all_v(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """``all_to_all_v``, asynchronous."""
        ...

    def start_transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """Send tensors to ranks of this group and fill others from them, all at once; asynchronous.

        Between two ranks, in one direction, first in is first out: the k-th that is sent fills the k-th that
        is to be received, whichever is waited for first, and both have as many elements of one dtype. Empty
        ones do not travel. What goes to ourselves is copied before this returns. A transfer may wait for its
        peers to start theirs. Processes do not check that both ends have as many elements.

        Args:
            sends: by the place of the rank that gets it; any strides.
            receives: by the place of the rank that it comes from; contiguous, filled.

        Raises:
            ValueError: a peer that is not in the group, a receive that is not contiguous, or something from
                us to us of which only one end is given or whose ends differ.
        """
        ...

    def metadata(self) -> AbstractContextManager[None]:
        """What runs inside carries host values (counts, indices) rather than tensors of the model."""
        ...

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """``all_reduce``, asynchronous."""
        ...

    def start_all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Pending:
        """``all_gather``, asynchronous."""
        ...

    def start_reduce_scatter(self, tensor: Tensor) -> Pending:
        """``reduce_scatter``, asynchronous."""
        ...

    def group(self, ranks: Sequence[int], name: str = "") -> "Comm":
        """The communicator of these world ranks, in this order; the same object whenever it is asked for.

        Called by its members only, in the same order by those that share several groups. Groups of one
        name are apart from those of another: neither order nor time of what they do need agree.

        Raises:
            ValueError: we are not among them, or one is twice among them.
        """
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in rank order, on every rank; tuples come back as lists.

        Raises:
            TypeError: not a JSON value (a fault of the caller).
        """
        ...

    def barrier(self) -> None:
        """Wait for the hosts of all ranks; work queued on a GPU is not waited for."""
        ...

    def twin(self) -> "Comm":
        """The same ranks apart from this communicator, for another thread; it carries host values only."""
        ...


class SingleComm:
    """One rank: every collective is the identity.

    Args:
        world_rank: who we are in the world.
    """

    size = 1

    def __init__(self, world_rank: int = 0) -> None:
        self.rank = 0
        self.ranks: tuple[int, ...] = (world_rank,)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """[1, *shape]."""
        if out is None:
            return tensor.detach().unsqueeze(0)
        return destination(tensor, 1, out).copy_(tensor.detach().unsqueeze(0))

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """The only row."""
        check_rows(tensor, 1)
        return tensor.detach()[0]

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        check_rows(tensor, 1)
        return tensor.detach()

    def all_to_all_v(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """The rows themselves."""
        check_parts(rows, send, receive, 0, 1)
        return rows.detach()

    def start_all_to_all_v(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Done at once."""
        result = self.all_to_all_v(rows, send, receive)
        return Pending(lambda: result)

    def start_transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """What goes to ourselves is copied; there is nobody else."""
        check_transfer(sends, receives, 0, self.ranks)
        copy_own(sends, receives, 0)
        return Transfer(lambda: None)

    def metadata(self) -> AbstractContextManager[None]:
        """Nothing is counted."""
        return nullcontext()

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """Done at once."""
        return Pending(lambda: tensor)

    def start_all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Pending:
        """Done at once."""
        result = self.all_gather(tensor, out)
        return Pending(lambda: result)

    def start_reduce_scatter(self, tensor: Tensor) -> Pending:
        """Done at once."""
        result = self.reduce_scatter(tensor)
        return Pending(lambda: result)

    def group(self, ranks: Sequence[int], name: str = "") -> Comm:
        """Itself: there are no other ranks."""
        check_members(ranks, self.ranks[0])
        if tuple(ranks) != self.ranks:
            raise ValueError(f"ranks {list(ranks)} reach beyond the only rank, {self.ranks[0]}")
        return self

    def gather_objects(self, value: Any) -> list[Any]:
        """Only our own value."""
        return [json.loads(json.dumps(value))]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def twin(self) -> Comm:
        """Itself: there is nothing to mix up."""
        return self


def destination(tensor: Tensor, size: int, out: Tensor | None) -> Tensor:
    """Where an all-gather of ``tensor`` goes: [size, *shape], a view of ``out`` where that is given."""
    shape = (size, *tensor.shape)
    if out is None:
        return tensor.detach().new_empty(shape)
    if out.numel() != size * tensor.numel() or out.dtype != tensor.dtype or not out.is_contiguous():
        found = f"{'' if out.is_contiguous() else 'non-contiguous '}{out.dtype} of {out.numel()}"
        raise ValueError(
            f"out is {found} elements; gathering needs {tensor.dtype} of {size * tensor.numel()}"
        )
    return out.detach().view(shape)


def check_rows(tensor: Tensor, size: int) -> None:
    """Refuse a tensor without one row for each rank."""
    if tensor.ndim == 0 or tensor.shape[0] != size:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has not one row for each of {size} ranks")


def check_parts(rows: Tensor, send: Sequence[int], receive: Sequence[int], rank: int, size: int) -> None:
    """Refuse counts that are not one for each rank, or not those of the rows."""
    if not len(send) == len(receive) == size or sum(send) != len(rows) or send[rank] != receive[rank]:
        raise ValueError(
            f"{len(rows)} rows cannot be sent as {list(send)} and received as {list(receive)} by rank {rank} "
            f"of {size}: one count for each rank, all rows sent, its own part the same in both"
        )


def check_transfer(
    sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], rank: int, ranks: tuple[int, ...]
) -> None:
    """Refuse peers that the group does not have, receives with gaps, and half a transfer to ourselves."""
    beyond = sorted(peer for peer in {*sends, *receives} if not 0 <= peer < len(ranks))
    if beyond:
        raise ValueError(
            f"rank {ranks[rank]} transfers to or from places {beyond} of a group of {len(ranks)}: ranks "
            f"{list(ranks)} have the places 0 to {len(ranks) - 1}"
        )
    gaps = sorted(peer for peer, tensor in receives.items() if not tensor.is_contiguous())
    if gaps:
        raise ValueError(f"what rank {ranks[rank]} receives from places {gaps} must be contiguous")
    own = [one[rank] for one in (sends, receives) if rank in one]
    forms = [f"{tensor.numel()} {tensor.dtype}" for tensor in own]
    if len(own) == 1 or len(set(forms)) > 1:
        raise ValueError(
            f"rank {ranks[rank]} gives {' and '.join(forms)} of a transfer to itself; both ends must be alike"
        )


def copy_own(sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], rank: int) -> None:
    """Copy what goes to ourselves."""
    if rank in sends:
        receives[rank].detach().view(-1).copy_(sends[rank].detach().reshape(-1))


def check_members(ranks: Sequence[int], own: int) -> None:
    """Refuse a group without us, or with a rank twice."""
    if own not in ranks or len(set(ranks)) != len(ranks):
        raise ValueError(
            f"rank {own} asks for a group of ranks {list(ranks)}: it must be in it, each rank once"
        )
