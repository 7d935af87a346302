"""Documents that ranks share: which of their tokens are where, and how their states come to every rank.

Every rank knows from ``Segments.cut`` where each document begins and ends, and has the states of them all.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache, reduce
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from weft.ops.segments import Cut
from weft.parallel.comm import Comm

KEPT = 32  # packs whose documents are kept, of all ranks that are threads of this process


class Documents:
    """Where the documents of a run lie.

    Args:
        lengths: tokens of each document.
        counts: tokens of each rank.
        rank: the one whose view this is.

    Attributes:
        here: documents with tokens on this rank, and those without any between them.
        lengths: how many tokens of each of them are here.
    """

    def __init__(self, lengths: Sequence[int], counts: Sequence[int], rank: int) -> None:
        self.ranks, self.rank = _runs(counts), rank
        self.all, own = _runs(lengths), self.ranks[rank]
        docs = [doc for doc, tokens in enumerate(self.all) if _both(tokens, own)]
        self.here = slice(docs[0], docs[-1] + 1) if docs else slice(0, 0)
        self.lengths = tuple(_both(tokens, own) for tokens in self.all[self.here])

    def parts(self, doc: int, rank: int) -> tuple[int, ...]:
        """Tokens of a document on the ranks from where it begins to ``rank``."""
        tokens = self.all[doc]
        return tuple(_both(tokens, own) for own in self.ranks[: rank + 1] if tokens.start < own.stop)

    @cached_property
    def continued(self) -> tuple[int, ...]:
        """``parts`` of the document that goes on here; empty where none does."""
        parts = self.parts(self.here.start, self.rank) if self.lengths else ()
        return parts if len(parts) > 1 else ()

    @cached_property
    def ending(self) -> list[slice]:
        """Documents that end on each rank, and those without tokens between them."""
        docs = [
            [doc for doc, tokens in enumerate(self.all) if tokens and tokens[-1] in own] for own in self.ranks
        ]
        return [slice(own[0], own[-1] + 1) if own else slice(0, 0) for own in docs]

    @cached_property
    def closing(self) -> list[tuple[int, int]]:
        """The documents whose last token is also the last of a rank, and this rank."""
        ends = [(own.stop - 1, rank) for rank, own in enumerate(self.ending) if own.stop]
        return [(doc, rank) for doc, rank in ends if self.all[doc].stop == self.ranks[rank].stop]

    @cached_property
    def inside(self) -> list[slice]:
        """``ending`` without ``closing``."""
        closed = {rank for _, rank in self.closing}
        return [slice(own.start, own.stop - (rank in closed)) for rank, own in enumerate(self.ending)]


@lru_cache(maxsize=KEPT)
def _documents(lengths: tuple[int, ...], counts: tuple[int, ...], rank: int) -> Documents:
    return Documents(lengths, counts, rank)


def documents(cut: Cut) -> Documents:
    """Where the documents of a run lie that is cut into parts, one of each rank."""
    return _documents(cut.whole.lengths, cut.counts, cut.index)


def _runs(counts: Sequence[int]) -> list[range]:
    return [range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0))]


def _both(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


def share(comm: Comm, held: Sequence[slice], states: Sequence[Tensor]) -> None:
    """Bring states to every rank, in place, in one exchange; none where there is nothing to bring.

    Args:
        comm: the ranks.
        held: documents whose states each rank has.
        states: ``[documents, ...]`` each.
    """
    counts = [own.stop - own.start for own in held]
    if not any(counts):
        return
    wide, mine = reduce(torch.promote_types, [t.dtype for t in states]), held[comm.rank]
    rows = torch.cat([t[mine].flatten(1).to(wide) for t in states], dim=1)
    send = rows.expand(comm.size, *rows.shape).flatten(0, 1)
    came = comm.all_to_all_v(send, [len(rows)] * comm.size, counts)
    widths = [t[0].numel() for t in states]
    for own, new in zip(held, came.split(counts), strict=True):
        for t, row in zip(states, new.split(widths, dim=1), strict=True):
            t[own] = row.view_as(t[own]).to(t.dtype)


def newest(inputs: Tensor, lengths: Sequence[int], before: Tensor) -> Tensor:
    """The last inputs of each document, ``[documents, channels, tail]``.

    Args:
        inputs: ``[tokens, channels]``.
        lengths: tokens of each document.
        before: what the result would be without these inputs.
    """
    tail, rows = before.shape[2], []
    for old, own in zip(before, inputs.split(list(lengths)), strict=True):
        held = min(tail, len(own))
        rows.append(torch.cat([old[:, held:], own[len(own) - held :].t()], dim=1))
    return torch.stack(rows)
