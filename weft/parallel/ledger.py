"""The ledger of bytes, and a communicator that plays one rank alone and only keeps the ledger."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.parallel.collectives import Collectives, Family
from weft.parallel.comm import Comm


@dataclass(frozen=True)
class Entry:
    """One collective of one rank, or one tensor that a transfer brought.

    Attributes:
        op: all_reduce, all_gather, reduce_scatter, all_to_all or transfer.
        ranks: world ranks of the group, in group order.
        bytes: what this rank receives under the ideal algorithm.
        metadata: whether it carried host values (JSON, barriers) rather than tensors of the model.
    """

    op: str
    ranks: tuple[int, ...]
    bytes: int
    metadata: bool


@dataclass
class Ledger:
    """The collectives of one rank, in order."""

    entries: list[Entry] = field(default_factory=list)

    def note(self, op: str, ranks: tuple[int, ...], count: int, metadata: bool) -> None:
        """Write down a collective in which this rank receives ``count`` bytes."""
        self.entries.append(Entry(op, ranks, count, metadata))

    def bytes(self, op: str | None = None, ranks: Sequence[int] | None = None) -> int:
        """Bytes received, without metadata; of one operation and of one group where given."""
        return sum(
            entry.bytes
            for entry in self.entries
            if not entry.metadata
            and (op is None or entry.op == op)
            and (ranks is None or entry.ranks == tuple(ranks))
        )

    @property
    def metadata_bytes(self) -> int:
        """Bytes of metadata received."""
        return sum(entry.bytes for entry in self.entries if entry.metadata)


@contextmanager
def record(comm: Comm) -> Iterator[Ledger]:
    """Collect the collectives of this rank in this communicator and all groups of its family.

    On torch.distributed the operations themselves are heard, so those of other callers count too. A single
    rank has none.
    """
    ledger = Ledger()
    if not isinstance(comm, Collectives):
        yield ledger
        return
    with comm.listening(ledger.note):
        yield ledger


class LedgerComm(Collectives):
    """One process plays one rank of many, on meta tensors or any others.

    Results have the right shapes and are zero, except that an all-reduce leaves its tensor as it is and
    objects are our own, ``size`` times.

    Args:
        rank: the rank played.
        size: number of ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, range(size))

    def _exchange(self, op: str, source: Tensor, out: Tensor) -> Callable[[], object]:
        self.note_whole(op, max(source.nbytes, out.nbytes))
        return (lambda: None) if op == "all_reduce" else out.zero_

    def _exchange_v(
        self, source: Tensor, out: Tensor, send: list[int], receive: list[int]
    ) -> Callable[[], object]:
        self.note_parts(out, receive)
        return out.zero_

    def _transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], object]:
        self.note_received(receives)
        return lambda: [tensor.zero_() for tensor in receives.values()]

    def _split(self, rank: int, ranks: tuple[int, ...], name: str) -> Comm:
        return _LedgerGroup(rank, ranks, self.family)

    def gather_objects(self, value: Any) -> list[Any]:
        """Our own value, as if every rank had the same."""
        text = json.dumps(value)
        with self.metadata():
            self.all_gather(torch.zeros((), dtype=torch.int64, device="cpu"))
            self.all_gather(torch.zeros(len(text), dtype=torch.uint8, device="cpu"))
        return [json.loads(text) for _ in range(self.size)]

    def twin(self) -> Comm:
        """The same rank with a family of its own."""
        return _LedgerGroup(self.rank, self.ranks)


class _LedgerGroup(LedgerComm):
    """Some of the ranks."""

    def __init__(self, rank: int, ranks: Sequence[int], family: Family | None = None) -> None:
        Collectives.__init__(self, rank, ranks, family)
