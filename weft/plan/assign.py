"""Which rank of an encoder computes which sequences: by cost, the longest first.

A bin is a rank of the data-parallel times context-parallel ranks of an encoder; ``cp`` bins that follow one
another, from a multiple of ``cp`` on, may share sequences. Assignment is a pure function of what every rank
knows of a step, so all ranks come to the same without a word; routes then bring rows to where tokens are, so
neither the order of samples nor the loss depends on it. (Balancing after batches are formed: arXiv
2503.23830; here large sequences are cut as well.)

The rule: the costliest come first. A sequence of more than a quarter of what bins have on average is cut
evenly into as few parts as cost less, at most ``cp``, for the least loaded bins of a group: of that which
consumes it if these have room, else of the least loaded. Any other goes to the bin that consumes it if that
has room, else to the least loaded. There is room for 1% more than the average. Ties go to the first.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from weft.plan.items import Piece

PARTS = 4  # a sequence that costs more than 1/PARTS of the mean of bins may be cut, into parts that do not
SLACK = 100  # a bin is filled with what it consumes up to the mean and 1/SLACK of it

Bins = tuple[tuple[Piece, ...], ...]


class _Job(NamedTuple):
    """Sequences that stay together."""

    cost: float
    sequences: tuple[int, ...]
    near: int


class _Loads:
    """Costs given to bins so far, and the least of them."""

    def __init__(self, bins: int, cp: int, most: float) -> None:
        self.cost, self.cp, self._most = [0.0] * bins, cp, most
        self._total = [0.0] * (bins // cp)
        self._bins = list(zip(self.cost, range(bins), strict=True))
        self._groups = list(zip(self._total, range(bins // cp), strict=True))

    def add(self, place: int, cost: float) -> None:
        """Give a cost to a bin."""
        group = place // self.cp
        self.cost[place] += cost
        self._total[group] += cost
        heapq.heappush(self._bins, (self.cost[place], place))
        heapq.heappush(self._groups, (self._total[group], group))

    def one(self, cost: float, near: int) -> int:
        """The bin that consumes it, if that has room; else that with the least."""
        if near >= 0 and self.cost[near] + cost <= self._most:
            return near
        return _least(self._bins, self.cost)

    def several(self, parts: int, cost: float, near: int) -> list[int]:
        """Of the group that consumes it, if that has room, else of that with the least: the least bins."""
        if near >= 0:
            found = self._lightest(near // self.cp, parts)
            if max(self.cost[place] for place in found) + cost / parts <= self._most:
                return found
        return self._lightest(_least(self._groups, self._total), parts)

    def _lightest(self, group: int, parts: int) -> list[int]:
        bins = range(group * self.cp, (group + 1) * self.cp)
        return sorted(sorted(bins, key=self.cost.__getitem__)[:parts])


def _least(heap: list[tuple[float, int]], now: list[float]) -> int:
    """The number of the least value, without what is no longer so in the heap."""
    while heap[0][0] != now[heap[0][1]]:
        heapq.heappop(heap)
    return heap[0][1]


def assign(
    costs: Sequence[float],
    bins: int,
    *,
    rows: Sequence[int],
    near: Sequence[int] | None = None,
    cp: int = 1,
    grain: int | Sequence[int] = 1,
    skip: int | Sequence[int] = 0,
    together: Sequence[int] | None = None,
) -> Bins:
    """The pieces of each bin, in the order of their sequences; the rule is above. Takes O(n log n).

    Args:
        costs: of sequences; of a part, as much as it has of the rows.
        bins: how many.
        rows: of each sequence.
        near: the bin on the rank that consumes the sequence, -1 where there is none.
        cp: bins of a group; 1 cuts nothing.
        grain: sequences are cut at multiples of so many rows, of each or of all,
        skip: after so many; these first rows belong to the first part.
        together: a number for sequences that go uncut to one bin; -1 for those that go alone.

    Raises:
        ValueError: not so many numbers as sequences, or bins that are no multiple of ``cp``.
    """
    grains, skips, near, together = (_each(one, costs) for one in (grain, skip, near, together))
    lengths = {len(one) for one in (costs, rows, near, together, grains, skips)}
    if bins < 1 or bins % cp or len(lengths) > 1:
        raise ValueError(f"sequences told of as {sorted(lengths)} cannot go to {bins} bins in {cp}s")
    mean = sum(costs) / bins
    loads = _Loads(bins, cp, mean * (1 + 1 / SLACK))
    given: list[list[Piece]] = [[] for _ in range(bins)]
    for cost, sequences, home in _jobs(costs, near, together):
        first = sequences[0]
        units = -(-(rows[first] - skips[first]) // grains[first])
        parts = min(cp, -int(-cost * PARTS // mean), units) if together[first] < 0 and mean else 1
        if parts > 1:
            pieces = _cut(first, rows[first], parts, (skips[first], grains[first]))
            places = loads.several(parts, cost, home)
        else:
            pieces = [Piece(i, 0, rows[i], rows[i]) for i in sequences]
            places = [loads.one(cost, home)] * len(pieces)
        for place, piece in zip(places, pieces, strict=True):
            given[place].append(piece)
            loads.add(place, costs[piece.sequence] * (piece.rows / piece.whole if parts > 1 else 1))
    return tuple(tuple(sorted(pieces)) for pieces in given)


def equal_counts(bins: int, rows: Sequence[int]) -> Bins:
    """Sequences in order, as many on each bin, whatever they cost: what assignment is compared with."""
    points = [len(rows) * i // bins for i in range(bins + 1)]
    return tuple(tuple(Piece(i, 0, rows[i], rows[i]) for i in range(*pair)) for pair in pairwise(points))


def loads_of(assigned: Bins, costs: Sequence[float]) -> list[float]:
    """What each bin has to do."""
    return [
        sum(costs[piece.sequence] * (piece.rows / piece.whole if piece.whole else 1) for piece in pieces)
        for pieces in assigned
    ]


def spread(loads: Sequence[float]) -> float:
    """The greatest load over the mean: how much longer a step takes than it would if all were even."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _each(value: int | Sequence[int] | None, costs: Sequence[float]) -> Sequence[int]:
    """A number for each sequence, -1 where none are given."""
    value = -1 if value is None else value
    return [value] * len(costs) if isinstance(value, int) else value


def _jobs(costs: Sequence[float], near: Sequence[int], together: Sequence[int]) -> list[_Job]:
    """Sequences, or those that stay together, the costliest first."""
    members: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(together):
        members.setdefault((key, -1) if key >= 0 else (-1, i), []).append(i)
    jobs = [_Job(sum(costs[i] for i in own), tuple(own), near[own[0]]) for own in members.values()]
    return sorted(jobs, key=lambda job: (-job.cost, job.sequences))


def _cut(sequence: int, rows: int, parts: int, at: tuple[int, int]) -> list[Piece]:
    """A sequence in parts as even as multiples of a grain allow, after rows to skip."""
    skip, grain = at
    units = -(-(rows - skip) // grain)
    points = [min(rows, skip + grain * (units * i // parts)) for i in range(parts + 1)]
    return [Piece(sequence, start, stop, rows) for start, stop in pairwise([0, *points[1:]])]
