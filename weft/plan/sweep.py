"""Runs of rows intersected as arrays: who has what others want, and who of several sends it.

The machinery of ``weft.plan.route``. Global rows are cut into segments whose holders are the same from end to
end, so that a target's run meets whole segments, but for its two ends. Ranks with equal holdings are one
group, named after the first of them, until one of them is chosen to send.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from weft.plan.runs import Holding, Run

Integers = Int64[np.ndarray, "..."]
Near = Callable[[int], int]


class Runs(NamedTuple):
    """Runs of an end.

    Attributes:
        rank: of each run.
        start: its first global row.
        stop: one past its last.
        place: local row of the first.
    """

    rank: Integers
    start: Integers
    stop: Integers
    place: Integers

    def at(self, chosen: np.ndarray) -> "Runs":
        """Some of them."""
        return Runs(*(column[chosen] for column in self))


class _Demand(NamedTuple):
    """Global rows from ``first`` on, all of one segment, that a target wants from its row ``place`` on."""

    segment: Integers
    target: Integers
    first: Integers
    place: Integers
    length: Integers

    def at(self, chosen: np.ndarray) -> "_Demand":
        """Some of them."""
        return _Demand(*(column[chosen] for column in self))


class _Holders:
    """Segments of the global rows, each in the same groups from end to end.

    Attributes:
        points: segment i is from ``points[i]`` to ``points[i + 1]``.
        first: the holders of segment i are those from ``first[i]`` to ``first[i + 1]``.
        group: of each holder.
        place: its local row at the start of the segment.
    """

    def __init__(self, have: Runs, want: Runs) -> None:
        ends = (want.start.min(keepdims=True), want.stop.max(keepdims=True))
        points = self.points = _distinct(have.start, have.stop, *ends)
        run, segment = _spread(np.searchsorted(points, have.start), np.searchsorted(points, have.stop))
        self._width = int(have.rank.max(initial=0)) + 1
        keys = segment * self._width + have.rank[run]
        order = np.argsort(keys)
        run, segment, self._keys = run[order], segment[order], keys[order]
        self.group = have.rank[run]
        self.place = have.place[run] + points[segment] - have.start[run]
        self.first: Integers = np.searchsorted(segment, np.arange(len(self.points)))

    def row(self, segment: Integers, group: Integers, at: Integers) -> Integers:
        """The local row at which a group has a global row of a segment."""
        holder = np.searchsorted(self._keys, segment * self._width + group)
        return self.place[holder] + at - self.points[segment]

    def apart(self) -> bool:
        """Whether no row is in two groups."""
        return bool((np.diff(self.first) <= 1).all())

    def sets(self, segments: Integers) -> tuple[list[tuple[int, ...]], Integers]:
        """The different sets of groups that have segments, and which of them has each of these."""
        if self.apart():
            sets, of = np.unique(self.group[self.first[segments]], return_inverse=True)
            return [(group,) for group in sets.tolist()], of
        asked, of = np.unique(segments, return_inverse=True)
        groups, first = self.group.tolist(), self.first.tolist()
        known: dict[tuple[int, ...], int] = {}
        found = [tuple(groups[first[i] : first[i + 1]]) for i in asked.tolist()]
        which: Integers = np.array([known.setdefault(one, len(known)) for one in found])[of]
        return list(known), which


def groups_of(holdings: Mapping[int, Holding]) -> dict[int, tuple[int, ...]]:
    """The ranks with one and the same holding, by the first of them."""
    same: dict[int, list[int]] = {}
    first: dict[Holding, int] = {}
    known: dict[int, int] = {}  # by identity, which is found without a look at the runs
    for rank in sorted(holdings):
        holding = holdings[rank]
        if id(holding) not in known:
            known[id(holding)] = first.setdefault(holding, rank)
        same.setdefault(known[id(holding)], []).append(rank)
    return {one: tuple(ranks) for one, ranks in same.items()}


def runs_of(holdings: Mapping[int, Holding], name: str, unique: bool) -> Runs:
    """The runs of an end.

    Raises:
        ValueError: a row is twice on a rank, or on two ranks of a unique end.
    """
    ranks = sorted(holdings)
    counts = np.array([len(holdings[rank]) for rank in ranks], np.int64)
    start, length = _flat(holdings[rank] for rank in ranks).T
    rows = np.cumsum(length) - length
    before = np.concatenate([rows, length.sum(keepdims=True)])[np.cumsum(counts) - counts]
    rank = np.repeat(np.array(ranks, np.int64), counts)
    runs = Runs(rank, start, start + length, rows - np.repeat(before, counts)).at(length > 0)
    ordered = runs.at(np.argsort(runs.start) if unique else np.lexsort((runs.start, runs.rank)))
    twice = ordered.start[1:] < ordered.stop[:-1]
    if not unique:
        twice &= ordered.rank[1:] == ordered.rank[:-1]
    if twice.any():
        i = int(twice.argmax())
        last = min(ordered.stop[i], ordered.stop[i + 1]) - 1
        one, other = sorted(ordered.rank[i : i + 2].tolist())
        where = f"rank {one} of the {name}, twice"
        if one < other:
            where = f"ranks {one} and {other} of a unique {name}"
        raise ValueError(f"rows {ordered.start[i + 1]} to {last} are on {where}")
    return runs


def sizes_of(runs: Runs, groups: Mapping[int, tuple[int, ...]]) -> dict[int, int]:
    """Rows of every rank of groups of which the first ranks have these runs."""
    rows = np.bincount(runs.rank, runs.stop - runs.start, max(groups, default=0) + 1)
    return {rank: int(rows[first]) for first, ranks in groups.items() for rank in ranks}


def table_of(
    have: Runs, groups: Mapping[int, tuple[int, ...]], want: Runs, near: Near | None
) -> Int64[np.ndarray, "legs 5"]:
    """Legs of source, its row, target, its row, length; in no order.

    Args:
        have: of the first rank of each group.
        groups: ranks that have the same.
        want: of every target.
        near: the node of a rank.

    Raises:
        ValueError: rows that are wanted are nowhere.
    """
    if not len(want.rank):
        return np.zeros((0, 5), np.int64)
    holders = _Holders(have, want)
    demand = _demand(holders, want)
    if len(groups) == sum(map(len, groups.values())) and holders.apart():
        source = group = holders.group[holders.first[demand.segment]]
    else:
        demand, source = _chosen(holders, groups, demand, near)
        leaders = {rank: first for first, ranks in groups.items() for rank in ranks}
        group = np.array([leaders.get(rank, 0) for rank in range(max(leaders) + 1)], np.int64)[source]
    start = holders.row(demand.segment, group, demand.first)
    return np.stack([source, start, demand.target, demand.place, demand.length], 1)


def rows_of(holding: Sequence[Run]) -> Int64[np.ndarray, " rows"]:
    """Every row of a holding, in its order."""
    starts, lengths = _flat([holding]).T
    return _spread(starts, starts + lengths)[1]


def _flat(holdings: Iterable[Sequence[Run]]) -> Int64[np.ndarray, "runs 2"]:
    return np.fromiter(chain.from_iterable(chain.from_iterable(holdings)), np.int64).reshape(-1, 2)


def _distinct(*values: Integers) -> Integers:
    ordered = np.sort(np.concatenate(values))
    return ordered[np.diff(ordered, prepend=ordered[0] - 1) > 0]


def _spread(first: Integers, last: Integers) -> tuple[Integers, Integers]:
    """Of each pair the integers from ``first`` to before ``last``: the number of the pair, the integer."""
    counts = last - first
    ends = np.cumsum(counts)
    values = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts - first, counts)
    return np.repeat(np.arange(len(counts)), counts), values


def _demand(holders: _Holders, want: Runs) -> _Demand:
    """What is wanted, cut at the ends of segments; targets and their rows ascending."""
    points = holders.points
    first, last = np.searchsorted(points, want.start, "right") - 1, np.searchsorted(points, want.stop)
    run, segment = _spread(first, last)
    start = np.maximum(want.start[run], points[segment])
    stop = np.minimum(want.stop[run], points[segment + 1])
    place = want.place[run] + start - want.start[run]
    nowhere = np.diff(holders.first)[segment] == 0
    if nowhere.any():
        lacking = nowhere.nonzero()[0].tolist()
        told = [f"rows {start[i]} to {stop[i] - 1} that rank {want.rank[run[i]]} wants" for i in lacking[:3]]
        more = f", and {len(lacking) - 3} more such runs" if len(lacking) > 3 else ""
        raise ValueError(f"no rank of the source has {'; '.join(told)}{more}")
    return _Demand(segment, want.rank[run], start, place, stop - start)


def _chosen(
    holders: _Holders, groups: Mapping[int, tuple[int, ...]], demand: _Demand, near: Near | None
) -> tuple[_Demand, Integers]:
    """Who sends what is wanted; it is cut where several share the work."""
    choices, which = _choices(holders, groups, demand, near)
    first, single = [ranks[0] for ranks in choices], [len(ranks) == 1 for ranks in choices]
    alone, rank = np.array(single)[which], np.array(first, np.int64)[which]
    sure, sender = demand.at(alone), rank[alone]
    away = sure.target != sender
    sent = np.bincount(sender[away], sure.length[away])
    loads = Counter({one: int(rows) for one, rows in enumerate(sent.tolist()) if rows})
    parts = [(sure, sender)]
    for i in sorted(range(len(choices)), key=lambda i: len(choices[i])):
        if not single[i]:
            parts.append(_dealt(demand.at(which == i), choices[i], loads))
    cut, ranks = zip(*parts, strict=True)
    return _Demand(*map(np.concatenate, zip(*cut, strict=True))), np.concatenate(ranks)


def _choices(
    holders: _Holders, groups: Mapping[int, tuple[int, ...]], demand: _Demand, near: Near | None
) -> tuple[list[tuple[int, ...]], Integers]:
    """The different lists of ranks that may send something, and which of them each demand has."""
    found, sets = holders.sets(demand.segment)
    holding = [sorted(rank for group in one for rank in groups[group]) for one in found]
    width = int(demand.target.max()) + 1
    pairs, of = np.unique(sets * width + demand.target, return_inverse=True)
    made: dict[tuple[int, ...], int] = {}
    best = [_best(holding[int(pair // width)], int(pair % width), near) for pair in pairs]
    which = [made.setdefault(ranks, len(made)) for ranks in best]
    return list(made), np.array(which, np.int64)[of]


def _best(ranks: list[int], target: int, near: Near | None) -> tuple[int, ...]:
    """Those from which a target may have what they all have."""
    if target in ranks:
        return (target,)
    if near is None:
        return tuple(ranks)
    node = near(target)
    return tuple(rank for rank in ranks if near(rank) == node) or tuple(ranks)


def _dealt(demand: _Demand, ranks: tuple[int, ...], loads: Counter[int]) -> tuple[_Demand, Integers]:
    """Demands one after another, cut into one part for each rank so that all have sent evenly much."""
    ends = np.cumsum(demand.length)
    shares = _levelled([loads[rank] for rank in ranks], int(ends[-1]))
    loads.update(dict(zip(ranks, shares, strict=True)))
    limits = np.cumsum(np.array(shares, np.int64))
    points = _distinct(np.zeros(1, np.int64), ends, limits)
    starts, stops = points[:-1], points[1:]
    of = np.searchsorted(ends, starts, "right")
    part, skipped = demand.at(of), starts - (ends - demand.length)[of]
    cut = part._replace(first=part.first + skipped, place=part.place + skipped, length=stops - starts)
    return cut, np.array(ranks, np.int64)[np.searchsorted(limits, starts, "right")]


def _levelled(loads: Sequence[int], more: int) -> list[int]:
    """``more`` dealt out so that the greatest load is as small as can be."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    below = level = used = 0
    for used, i in enumerate(order, 1):
        below += loads[i]
        level = (below + more) // used
        if used == len(order) or level <= loads[order[used]]:
            break
    dealt = [max(0, level - load) for load in loads]
    rest = more - sum(dealt)  # less than one for each
    for i in order[:used][:rest]:
        dealt[i] += 1
    return dealt
