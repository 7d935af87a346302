"""The communicator: one small interface, three back ends.

``threads.py`` runs ranks as threads of one process, ``c10d.py`` as processes of ``torch.distributed``, and
``ledger.py`` plays one rank alone. A back end supplies the exchange of flat buffers; shapes, empty tensors,
objects and sub-groups are handled here, once. Nothing in this package's communicators is differentiable.

Objects travel as JSON text, in every back end: nothing is ever unpickled, and what cannot travel between
processes does not travel between threads either.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Listener = Callable[[str, tuple[int, ...], int, bool], None]
"""Told of each collective of this rank: its name, world ranks, bytes of the full buffer, whether metadata."""


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


@runtime_checkable
class Comm(Protocol):
    """A group of ranks that compute together.

    Members call the same collectives in the same order. Inputs may be of any strides. The ``start_`` forms
    return at once; neither input nor output may be touched before ``wait``. With one rank, results may share
    memory with inputs.

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

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """``all_reduce``, asynchronous."""
        ...

    def start_all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Pending:
        """``all_gather``, asynchronous."""
        ...

    def start_reduce_scatter(self, tensor: Tensor) -> Pending:
        """``reduce_scatter``, asynchronous."""
        ...

    def group(self, ranks: Sequence[int]) -> "Comm":
        """The communicator of these world ranks, in this order; the same object whenever it is asked for.

        Called by its members only, in the same order by those that share several groups.

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
        return _destination(tensor, 1, out).copy_(tensor.detach().unsqueeze(0))

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """The only row."""
        _check_rows(tensor, 1)
        return tensor.detach()[0]

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        _check_rows(tensor, 1)
        return tensor.detach()

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

    def group(self, ranks: Sequence[int]) -> Comm:
        """Itself: there are no other ranks."""
        _check_members(ranks, self.ranks[0])
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


@dataclass
class Family:
    """What a communicator shares with its sub-groups on one rank.

    Attributes:
        groups: every communicator made so far, by its world ranks.
        listeners: who is told of collectives.
        metadata: whether what runs now carries host values rather than tensors of the model.
    """

    groups: dict[tuple[int, ...], Comm] = field(default_factory=dict)
    listeners: list[Listener] = field(default_factory=list)
    metadata: bool = False


class Collectives(ABC):
    """The communicator over an exchange of flat buffers, which a back end supplies.

    Args:
        rank: our place in ``ranks``.
        ranks: world ranks of the members, in group order.
        family: shared with the communicator this one was made from; a family of its own by default.
    """

    def __init__(self, rank: int, ranks: Sequence[int], family: Family | None = None) -> None:
        self.rank, self.ranks, self.size = rank, tuple(ranks), len(ranks)
        self.family = family or Family()
        self.family.groups[self.ranks] = self

    @abstractmethod
    def _exchange(self, op: str, source: Tensor, out: Tensor) -> Callable[[], object]:
        """Begin a collective of flat, contiguous, non-empty buffers; the callable completes ``out``.

        ``source`` is ``out`` in an all-reduce; otherwise they do not depend on each other's memory.
        """

    @abstractmethod
    def _split(self, rank: int, ranks: tuple[int, ...]) -> Comm:
        """A communicator of several ranks, in our family."""

    @abstractmethod
    def twin(self) -> Comm:
        """The same ranks apart from this communicator, for another thread; it carries host values only."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank gets the same bits."""
        return self.start_all_reduce(tensor).wait()

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """[*shape] of every rank -> [size, *shape], in rank order."""
        return self.start_all_gather(tensor, out).wait()

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """[size, *shape] -> [*shape]: row ``rank``, summed over ranks."""
        return self.start_reduce_scatter(tensor).wait()

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """[size, *shape] -> [size, *shape]: row i goes to rank i, row j of the result is from rank j."""
        _check_rows(tensor, self.size)
        return self._start("all_to_all", tensor, torch.empty_like(tensor, memory_format=_DENSE)).wait()

    def start_all_reduce(self, tensor: Tensor) -> Pending:
        """``all_reduce``, asynchronous."""
        dense = tensor.detach().contiguous()
        pending = self._start("all_reduce", dense, dense)

        def finish() -> Tensor:
            pending.wait()
            if not tensor.is_contiguous():
                tensor.detach().copy_(dense)
            return tensor

        return Pending(finish)

    def start_all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Pending:
        """``all_gather``, asynchronous."""
        return self._start("all_gather", tensor, _destination(tensor, self.size, out))

    def start_reduce_scatter(self, tensor: Tensor) -> Pending:
        """``reduce_scatter``, asynchronous."""
        _check_rows(tensor, self.size)
        return self._start("reduce_scatter", tensor, tensor.detach().new_empty(tensor.shape[1:]))

    def _start(self, op: str, tensor: Tensor, out: Tensor) -> Pending:
        if not tensor.numel():
            self.note(op, 0)
            return Pending(lambda: out)
        complete = self._exchange(op, tensor.detach().contiguous().view(-1), out.view(-1))

        def finish() -> Tensor:
            complete()
            return out

        return Pending(finish)

    def group(self, ranks: Sequence[int]) -> Comm:
        """The communicator of these world ranks, in this order; the same object whenever asked for."""
        members, own = tuple(ranks), self.ranks[self.rank]
        _check_members(members, own)
        if members not in self.family.groups:
            single = len(members) == 1
            made = SingleComm(own) if single else self._split(members.index(own), members)
            self.family.groups[members] = made
        return self.family.groups[members]

    def gather_objects(self, value: Any) -> list[Any]:
        """Values in rank order: lengths first, then the texts, filled up to the longest."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self._metadata():
            lengths = self.all_gather(torch.tensor(len(text), device="cpu")).tolist()
            padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
            padded[: len(text)] = text
            texts = self.all_gather(padded).numpy()
        return [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait for the hosts of all ranks; work queued on a GPU is not waited for."""
        with self._metadata():
            self.all_reduce(torch.zeros((), device="cpu"))

    @contextmanager
    def _metadata(self) -> Iterator[None]:
        self.family.metadata = True
        try:
            yield
        finally:
            self.family.metadata = False

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` of every collective of this rank, in this communicator and its sub-groups."""
        self.family.listeners.append(listener)
        try:
            yield
        finally:
            self.family.listeners.remove(listener)

    def note(self, op: str, whole: int) -> None:
        """Tell the listeners of a collective whose full buffer has ``whole`` bytes."""
        for listener in self.family.listeners:
            listener(op, self.ranks, whole, self.family.metadata)


_DENSE = torch.contiguous_format


def _destination(tensor: Tensor, size: int, out: Tensor | None) -> Tensor:
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


def _check_rows(tensor: Tensor, size: int) -> None:
    if tensor.ndim == 0 or tensor.shape[0] != size:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has not one row for each of {size} ranks")


def _check_members(ranks: Sequence[int], own: int) -> None:
    if own not in ranks or len(set(ranks)) != len(ranks):
        raise ValueError(
            f"rank {own} asks for a group of ranks {list(ranks)}: it must be in it, each rank once"
        )
