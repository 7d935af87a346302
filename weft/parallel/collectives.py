"""What the back ends of the communicator share: shapes, empty tensors, objects, sub-groups, listeners.

A back end supplies the exchange of flat buffers.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.parallel.comm import (
    Comm,
    Pending,
    SingleComm,
    Transfer,
    check_members,
    check_parts,
    check_rows,
    check_transfer,
    copy_own,
    destination,
)

Listener = Callable[[str, tuple[int, ...], int, bool], None]
"""Told of each collective of this rank: its name, world ranks, bytes received, whether metadata.

Of transfers, of each tensor that is received.
"""


def received(op: str, size: int, whole: int) -> int:
    """Bytes that each of ``size`` ranks receives at least, for a full buffer of ``whole`` bytes.

    ``(size - 1) / size`` of the buffer; an all-reduce is a reduce-scatter and an all-gather, hence twice
    that, rounded down. The full buffer is the gathered, the scattered, the summed, or the local one.
    """
    return (2 if op == "all_reduce" else 1) * (size - 1) * whole // size


@dataclass
class Family:
    """What a communicator shares with its sub-groups on one rank.

    Attributes:
        groups: every communicator made so far, by its world ranks and its name.
        listeners: who is told of collectives.
        metadata: whether what runs now carries host values rather than tensors of the model.
    """

    groups: dict[tuple[tuple[int, ...], str], Comm] = field(default_factory=dict)
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
        self.family = family or Family({(self.ranks, ""): self})

    @abstractmethod
    def _exchange(self, op: str, source: Tensor, out: Tensor) -> Callable[[], object]:
        """Begin a collective of flat, contiguous, non-empty buffers; the callable completes ``out``.

        ``source`` is ``out`` in an all-reduce; otherwise they do not depend on each other's memory.
        """

    @abstractmethod
    def _exchange_v(
        self, source: Tensor, out: Tensor, send: list[int], receive: list[int]
    ) -> Callable[[], object]:
        """Begin to exchange flat buffers, ``send[i]`` elements to rank i; the callable completes ``out``."""

    @abstractmethod
    def _transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], object]:
        """Begin a transfer of flat, contiguous, non-empty buffers with others; the callable completes it."""

    @abstractmethod
    def _split(self, rank: int, ranks: tuple[int, ...], name: str) -> Comm:
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
        check_rows(tensor, self.size)
        return self._start(
            "all_to_all", tensor, torch.empty_like(tensor, memory_format=torch.contiguous_format)
        ).wait()

    def all_to_all_v(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """[sum(send), *shape] -> [sum(receive), *shape]: ``send[i]`` rows, in order, go to rank i."""
        return self.start_all_to_all_v(rows, send, receive).wait()

    def start_all_to_all_v(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """``all_to_all_v``, asynchronous."""
        check_parts(rows, send, receive, self.rank, self.size)
        out = rows.detach().new_empty(sum(receive), *rows.shape[1:])
        width = math.prod(rows.shape[1:])
        parts = [width * count for count in send], [width * count for count in receive]
        complete = self._exchange_v(rows.detach().contiguous().view(-1), out.view(-1), *parts)

        def finish() -> Tensor:
            complete()
            return out

        return Pending(finish)

    def start_transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Transfer:
        """Send tensors to ranks of this group and fill others from them, all at once; asynchronous."""
        check_transfer(sends, receives, self.rank, self.ranks)
        copy_own(sends, receives, self.rank)

        def travelling(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
            others = ((peer, tensor) for peer, tensor in tensors.items() if peer != self.rank)
            return {peer: tensor.detach().reshape(-1) for peer, tensor in others if tensor.numel()}

        return Transfer(self._transfer(travelling(sends), travelling(receives)))

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
        return self._start("all_gather", tensor, destination(tensor, self.size, out))

    def start_reduce_scatter(self, tensor: Tensor) -> Pending:
        """``reduce_scatter``, asynchronous."""
        check_rows(tensor, self.size)
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

    def group(self, ranks: Sequence[int], name: str = "") -> Comm:
        """The communicator of these world ranks, in this order; the same object whenever asked for."""
        members, own = tuple(ranks), self.ranks[self.rank]
        check_members(members, own)
        if (members, name) not in self.family.groups:
            single = len(members) == 1
            made = SingleComm(own) if single else self._split(members.index(own), members, name)
            self.family.groups[members, name] = made
        return self.family.groups[members, name]

    def gather_objects(self, value: Any) -> list[Any]:
        """Values in rank order: lengths first, then the texts, filled up to the longest."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.metadata():
            lengths = self.all_gather(torch.tensor(len(text), device="cpu")).tolist()
            padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
            padded[: len(text)] = text
            texts = self.all_gather(padded).numpy()
        return [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait for the hosts of all ranks; work queued on a GPU is not waited for."""
        with self.metadata():
            self.all_reduce(torch.zeros((), device="cpu"))

    @contextmanager
    def metadata(self) -> Iterator[None]:
        """What runs inside carries host values (counts, indices) rather than tensors of the model."""
        before, self.family.metadata = self.family.metadata, True
        try:
            yield
        finally:
            self.family.metadata = before

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` of every collective of this rank, in this communicator and its sub-groups."""
        self.family.listeners.append(listener)
        try:
            yield
        finally:
            self.family.listeners.remove(listener)

    def note(self, op: str, count: int) -> None:
        """Tell the listeners of a collective in which this rank receives so many bytes."""
        for listener in self.family.listeners:
            listener(op, self.ranks, count, self.family.metadata)

    def note_whole(self, op: str, whole: int) -> None:
        """Tell them of one whose full buffer has ``whole`` bytes."""
        self.note(op, received(op, self.size, whole))

    def note_parts(self, out: Tensor, receive: Sequence[int]) -> None:
        """Tell them of an uneven exchange with ``receive[j]`` elements of ``out`` from rank j."""
        self.note("all_to_all", (sum(receive) - receive[self.rank]) * out.element_size())

    def note_received(self, receives: Mapping[int, Tensor]) -> None:
        """Tell them of what a transfer receives."""
        for tensor in receives.values():
            self.note("transfer", tensor.nbytes)
