"""Slots of encoders whose rows lie on several ranks: rows around one's own, and blocks of rows.

Both are static routes over rows of sequences, so any cut of any sequence will do, and what is here already
does not travel.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from jaxtyping import Shaped
from torch import Tensor

from weft.nn.slots import Halo, Regroup
from weft.parallel.comm import Comm
from weft.parallel.route import Channel, moved
from weft.plan.items import Piece, Pieces, reach
from weft.plan.route import End, Route, compile_route
from weft.plan.runs import Holding, Run
from weft.plan.shard import Plane


class _Channels:
    """A channel for each shape and dtype of rows, between the same ranks."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self._made: dict[tuple[tuple[int, ...], torch.dtype], Channel] = {}

    def move(self, x: Shaped[Tensor, "..."], route: Route) -> Shaped[Tensor, "..."]:
        """Rows on a route; differentiable."""
        key = tuple(x.shape[1:]), x.dtype
        if key not in self._made:
            self._made[key] = Channel(self.comm, *key, x.device)
        channel = self._made[key]
        return moved(x.contiguous(), route, channel, channel)


class ContextHalo(Halo):
    """Rows of sequences that are cut over the ranks of ``comm``."""

    def __init__(self, rows: int | None, comm: Comm) -> None:
        super().__init__(rows)
        self._channels = _Channels(comm)

    def forward(self, x: Shaped[Tensor, "rows *width"], pieces: Pieces) -> Shaped[Tensor, "around *width"]:
        """Own rows, and those around them from the ranks that have them."""
        if not pieces.shared:
            return x
        ranks = tuple(self._channels.comm.ranks)
        return self._channels.move(x, _around(ranks, pieces.ranks, self.rows))


@lru_cache(maxsize=64)
def _around(ranks: tuple[int, ...], pieces: tuple[tuple[Piece, ...], ...], rows: int | None) -> Route:
    """Each rank wants its pieces and so many rows on both sides."""
    whole: dict[int, int] = {piece.sequence: piece.whole for own in pieces for piece in own}
    starts = dict(zip(whole, accumulate(whole.values(), initial=0), strict=False))

    def holding(own: Sequence[Piece]) -> Holding:
        return tuple(Run(starts[piece.sequence] + piece.start, piece.rows) for piece in own)

    have = {rank: holding(own) for rank, own in zip(ranks, pieces, strict=True)}
    want = {
        rank: holding([reach(piece, rows) for piece in own]) for rank, own in zip(ranks, pieces, strict=True)
    }
    return compile_route(End(have), End(want, "replicated"))


class ShardedRegroup(Regroup):
    """Blocks of a bin's rows, shared evenly by the ranks of a plane."""

    def __init__(self, slot: Regroup, comm: Comm, plane: Plane) -> None:
        super().__init__(slot.skip, slot.block)
        self._channels, self._plane = _Channels(comm), plane

    def forward(self, x: Shaped[Tensor, "rows width"], pieces: Pieces) -> Shaped[Tensor, "blocks wide"]:
        """Whole blocks here; rows of one that is cut come from the neighbours."""
        ranks = tuple(self._channels.comm.ranks)
        rows = self._channels.move(x, _blocks(ranks, pieces.here, self.skip, self.block, self._plane))
        return rows.reshape(-1, self.block * x.shape[-1])


@lru_cache(maxsize=64)
def _blocks(ranks: tuple[int, ...], pieces: tuple[Piece, ...], skip: int, block: int, plane: Plane) -> Route:
    """From residual rows of a bin to an even share of its blocks."""
    ends = list(accumulate((piece.rows for piece in pieces), initial=0))
    kept = [
        Run(end + max(skip - piece.start, 0), max(0, piece.stop - max(skip, piece.start)))
        for piece, end in zip(pieces, ends, strict=False)
    ]
    blocks = sum(run.length for run in kept) // block
    have: dict[int, Holding] = {}
    want: dict[int, Holding] = {}
    for place, rank in enumerate(ranks):
        rows, own = plane.residual_rows(ends[-1], place), plane.rows(blocks, place)
        have[rank] = (Run(rows.start, len(rows)),) if rows else ()
        want[rank] = tuple(_cut(kept, own.start * block, own.stop * block))
    return compile_route(End(have), End(want))


def _cut(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """Rows ``first`` to ``last`` of these runs, counted through them."""
    found: list[Run] = []
    for run, at in zip(runs, accumulate((run.length for run in runs), initial=0), strict=False):
        start, stop = max(first, at), min(last, at + run.length)
        if start < stop:
            found.append(Run(run.start + start - at, stop - start))
    return found
