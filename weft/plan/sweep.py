"""Ends of routes intersected as arrays: who has what others want, and who of several sends or takes it.

The machinery of ``weft.plan.route``. Global rows are cut into segments in which neither end changes, so that
each question (who has it, who wants it, who of them) is asked once for a segment and answered for all
segments together. Ranks with equal runs are one group.

Two numbers bound a route: runs at both ends are sorted once (their 2n borders as 64-bit numbers), and some
ten columns of 8 bytes are passed over for each run, each segment of a holder and each leg; no row is seen.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from weft.plan.holders import BITS, Holders, Integers, Ranks, order, spread

Near = Callable[[int], int]


class _Side:
    """An end, cut into segments.

    Attributes:
        first: holders of segment i are the entries from ``first[i]`` to before ``first[i + 1]``.
        segment: of each entry, ascending.
        group: of each entry, ascending within a segment.
        place: local row of each entry at the start of its segment.
        members: ranks of each group.
        ranks: the same one after another: those of group g are ``count[g]`` from ``member[g]`` on.
        leaders: the first rank of each group.
        single: whether each group is one rank.
        disjoint: whether no row is in two groups.
        apart: whether no row is on two ranks.
    """

    def __init__(self, end: Holders, first: Integers, stop: Integers, points: Integers) -> None:
        self.members = end.members
        self.ranks: Integers = np.array([rank for ranks in end.members for rank in ranks], np.int64)
        self.count = np.array([len(ranks) for ranks in end.members], np.int64)
        self.member = np.cumsum(self.count) - self.count
        self.leaders: Integers = self.ranks[self.member]
        run, segment = spread(first, stop)
        if not (first[1:] >= stop[:-1]).all():
            sort = order(segment * len(end.members) + end.group[run])
            run, segment = run[sort], segment[sort]
        self.segment, self.group = segment, end.group[run]
        self.place = (end.place - end.start)[run] + points[segment]
        self.first = _firsts(segment, len(points) - 1)
        self.single = len(self.ranks) == len(self.members)
        self.disjoint = bool((np.diff(self.first) <= 1).all())
        self.apart = self.single and self.disjoint

    def each(self, alike: bool) -> tuple[Integers, Integers]:
        """Entries and their groups if those are ``alike``; else entries once for each rank, and that rank."""
        entry = np.arange(len(self.group))
        if alike or self.single:
            return entry, self.group if alike else self.leaders[self.group]
        first = self.member[self.group]
        entry, member = spread(first, first + self.count[self.group])
        return entry, self.ranks[member]

    def of(self, rank: Integers) -> Integers:
        """The groups of ranks, -1 where they are in none."""
        groups = np.full(max(int(self.ranks.max(initial=0)), int(rank.max(initial=0))) + 1, -1, np.int64)
        groups[self.ranks] = np.repeat(np.arange(len(self.members)), self.count)
        return groups[rank]

    def entries(self, segment: Integers, label: Integers, alike: bool) -> Integers:
        """The entries of ranks, of groups if ``alike``, in segments that are somewhere; else any."""
        if self.disjoint:
            return self.first[segment]
        width, group = len(self.members), label if alike else self.of(label)
        entry = np.searchsorted(self.segment * width + self.group, segment * width + group)
        return np.minimum(entry, len(self.group) - 1)

    def has(self, segment: Integers, rank: Integers) -> Bool[np.ndarray, "..."]:
        """Whether ranks have segments that some group has."""
        entry = self.entries(segment, rank, alike=False)
        return (self.group[entry] == self.of(rank)) & (self.segment[entry] == segment)

    def sets(self, segment: Integers) -> tuple[list[Ranks], Integers]:
        """The different sets of ranks that have segments, and which of them has each of these."""
        if self.disjoint:
            used, of = _numbered(self.group[self.first[segment]])
            return [self.members[group] for group in used.tolist()], of
        used, of = _numbered(segment)
        label = np.zeros(len(used), np.int64)
        run, entry = spread(self.first[used], self.first[used + 1])
        for word in range(0, len(self.members), BITS):  # a set as bits, 62 groups at a time
            group = self.group[entry] - word
            bit = np.where((group >= 0) & (group < BITS), np.left_shift(1, np.clip(group, 0, BITS - 1)), 0)
            bits = np.zeros(len(used), np.int64)
            np.add.at(bits, run, bit)
            values, which = np.unique(bits, return_inverse=True)
            label = _numbered(label * len(values) + which)[1]
        example = np.zeros(int(label.max(initial=-1)) + 1, np.int64)
        example[label] = used
        found: list[Ranks] = []
        for i in example:
            groups: list[int] = self.group[self.first[i] : self.first[i + 1]].tolist()
            found.append(tuple(sorted(rank for group in groups for rank in self.members[group])))
        return found, label[of]


class _Demand(NamedTuple):
    """Rows of segments, for each of which one pair of ranks is to be found.

    Attributes:
        segment: of which they are.
        skip: rows of the segment before them.
        length: rows.
        source: a rank, or -1 where it is not chosen yet.
        target: as ``source``.
    """

    segment: Integers
    skip: Integers
    length: Integers
    source: Integers
    target: Integers

    def at(self, chosen: np.ndarray) -> "_Demand":
        """Some of them."""
        return _Demand(*(column[chosen] for column in self))


def table_of(
    have: Holders, want: Holders, every: tuple[bool, bool], near: Near | None
) -> Int64[np.ndarray, "legs 5"]:
    """The legs, of which those that continue one another are one, in the order of ``ordered``.

    Args:
        have: what sources have, as ``checked`` gives it.
        want: what targets want, likewise.
        every: whether all ranks that have a row send it, and whether all that want it get it; else one.
        near: the node of a rank.

    Raises:
        ValueError: rows that are wanted are nowhere.
    """
    if not len(want.group):
        return np.zeros((0, 5), np.int64)
    source, target, points = _segments(have, want)
    _found(source, target, points)
    alike = (every[0] or source.apart) and (every[1] or target.apart)  # all of a group do the same
    demand = _demand(source, target, every, points, alike)
    if not alike:
        ranks = {*source.ranks.tolist(), *target.ranks.tolist()}
        node = None if near is None else {rank: near(rank) for rank in ranks}
        if not every[1]:
            demand = _picked(demand, target, source, "target", node)
        if not every[0]:
            demand = _picked(demand, source, target, "source", node)
    ends: list[Integers] = []
    for side, rank in ((source, demand.source), (target, demand.target)):
        entry = side.entries(demand.segment, rank, alike)
        ends += rank, side.place[entry] + demand.skip
    table = _merged(ordered(np.stack([*ends, demand.length])))
    return (_expanded(table, source, target) if alike else table).T


def ordered(table: Int64[np.ndarray, "5 legs"]) -> Int64[np.ndarray, "5 legs"]:
    """By target, source and place as one number: 62 bits hold 10^5 ranks of each with 10^8 rows."""
    ranks, rows = int(table[0].max(initial=0)) + 1, int(table[3].max(initial=0)) + 1
    return table.take(order((table[2] * ranks + table[0]) * rows + table[3]), 1)


def _merged(table: Integers) -> Integers:
    """Legs that continue one another, on both ends, joined."""
    source, start, target, place, length = table
    new = np.ones(len(source), np.bool_)
    before, after = slice(None, -1), slice(1, None)
    np.not_equal(start[before] + length[before], start[after], out=new[after])
    new[after] |= place[before] + length[before] != place[after]
    new[after] |= (source[before] != source[after]) | (target[before] != target[after])
    if new.all():
        return table
    first = np.flatnonzero(new)
    joint = table.take(first, 1)
    joint[4] = np.add.reduceat(length, first)
    return joint


def _expanded(table: Integers, source: _Side, target: _Side) -> Integers:
    """Legs between groups, once for each rank of the one and each of the other."""
    if target.single and source.single:
        table[0], table[2] = source.leaders.take(table[0]), target.leaders.take(table[2])
        return table
    pair = table[2] * len(source.members) + table[0]
    first = np.flatnonzero(np.append(True, pair[1:] != pair[:-1]))
    stop = np.append(first[1:], table.shape[1])
    by, to = table[0][first], table[2][first]
    wide = source.count[by]
    block, k = spread(np.zeros_like(by), wide * target.count[to])
    sources = source.ranks[source.member[by[block]] + k % wide[block]]
    targets = target.ranks[target.member[to[block]] + k // wide[block]]
    sort = order(targets * (int(sources.max()) + 1) + sources)
    block, leg = spread(first[block[sort]], stop[block[sort]])
    full = np.empty((5, len(leg)), np.int64)
    sources[sort].take(block, out=full[0], mode="clip")  # the mode that needs no copy
    targets[sort].take(block, out=full[2], mode="clip")
    for column in (1, 3, 4):
        table[column].take(leg, out=full[column], mode="clip")
    return full


def _segments(have: Holders, want: Holders) -> tuple[_Side, _Side, Integers]:
    """Both ends in the same segments, and the borders of these."""
    borders = np.concatenate([have.start, want.start, have.start + have.length, want.start + want.length])
    sort = order(borders)
    values = borders.take(sort)
    new = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    at = np.empty(len(sort), np.int64)
    at[sort] = np.cumsum(new) - 1
    first, stop = at.reshape(2, -1)
    points, n = values[np.flatnonzero(new)], len(have.start)
    return _Side(have, first[:n], stop[:n], points), _Side(want, first[n:], stop[n:], points), points


def _found(source: _Side, target: _Side, points: Integers) -> None:
    """Refuse what is wanted and nowhere."""
    lacking = np.flatnonzero(np.diff(source.first)[target.segment] == 0).tolist()
    if lacking:
        rows: list[str] = []
        for i in lacking[:3]:
            at, rank = target.segment[i], target.members[int(target.group[i])][0]
            rows.append(f"rows {points[at]} to {points[at + 1] - 1} that rank {rank} wants")
        more = f", and {len(lacking) - 3} more such runs" if len(lacking) > 3 else ""
        raise ValueError(f"no rank of the source has {'; '.join(rows)}{more}")


def _demand(source: _Side, target: _Side, every: tuple[bool, bool], points: Integers, alike: bool) -> _Demand:
    """Each segment once, or once for each rank of an end of which all take part; each group if ``alike``."""
    segment = np.flatnonzero(np.diff(target.first))
    by = to = np.full(len(segment), -1, np.int64)
    if every[1] or target.apart:
        entry, to = target.each(alike)
        segment = target.segment[entry]
    if source.disjoint and (alike or source.apart):
        by = source.group[source.first[segment]]
        by = by if alike else source.leaders[by]
    elif every[0]:
        entry, ranks = source.each(alike)
        first = _firsts(source.segment[entry], len(points) - 1)
        old, which = spread(first[segment], first[segment + 1])
        segment, to, by = segment[old], to[old], ranks[which]
    elif len(by) < len(segment):
        by = np.full(len(segment), -1, np.int64)
    return _Demand(segment, np.zeros_like(segment), np.diff(points)[segment], by, to)


def _picked(
    demand: _Demand, options: _Side, others: _Side, name: str, node: Mapping[int, int] | None
) -> _Demand:
    """One rank of a side for each demand: one that is on the other side too, else near it, else any.

    Of several, all get evenly many rows, in as few parts as that allows.
    """
    if options.apart:
        return demand
    other = demand.source if name == "target" else demand.target
    sets, which = options.sets(demand.segment)
    here = np.zeros(len(other), np.bool_)
    if known := bool(other[0] >= 0):
        if set(options.ranks.tolist()) & set(others.ranks.tolist()):
            here = options.has(demand.segment, other)
        homes, of = _numbered(_homes(others.ranks, node)[other])
        peers = [(rank,) for rank in homes.tolist()]
    else:
        peers, of = others.sets(demand.segment)
    left = np.flatnonzero(~here)
    pairs, of = _numbered((which * len(peers) + of)[left])
    asked: list[tuple[int, int]] = [divmod(pair, len(peers)) for pair in pairs.tolist()]
    best = [_best(sets[one], peers[peer], not known, node) for one, peer in asked]
    pools = {ranks: i for i, ranks in enumerate(dict.fromkeys(best))}
    of = np.array([pools[ranks] for ranks in best], np.int64)[of]
    cut, rank = _dealt(demand.at(left), list(pools), of)
    cut = cut._replace(**{name: rank})
    if len(left) == len(here):
        return cut
    done = demand.at(here)._replace(**{name: other[here]})
    return _Demand(*(np.concatenate(pair) for pair in zip(done, cut, strict=True)))


def _homes(ranks: Integers, node: Mapping[int, int] | None) -> Integers:
    """By rank, the first one of its node: what is near to one is near to the other."""
    homes = np.zeros(int(ranks.max()) + 1, np.int64)
    first: dict[int, int] = {}
    for rank in ranks.tolist():
        homes[rank] = first.setdefault(node[rank] if node else 0, rank)
    return homes


def _firsts(ascending: Integers, bound: int) -> Integers:
    """Where each number from 0 to ``bound`` is first, or would be."""
    first = np.zeros(bound + 1, np.int64)
    np.cumsum(np.bincount(ascending, minlength=bound), out=first[1:])
    return first


def _numbered(keys: Integers) -> tuple[Integers, Integers]:
    """The distinct values of numbers from 0 on, ascending, and which of them each is."""
    most = int(keys.max(initial=-1)) + 1
    if most > 8 * len(keys) + 64:
        values, which = np.unique(keys, return_inverse=True)
        return values, which
    there = np.zeros(most, np.bool_)
    there[keys] = True
    return np.flatnonzero(there), (np.cumsum(there) - 1)[keys]


def _best(options: Ranks, peers: Ranks, local: bool, node: Mapping[int, int] | None) -> Ranks:
    """The best of some ranks for peers: the peers themselves, else those near them, else all."""
    same = tuple(rank for rank in options if rank in peers) if local else ()
    if same or node is None:
        return same or options
    nodes = {node[rank] for rank in peers}
    return tuple(rank for rank in options if node[rank] in nodes) or options


def _dealt(demand: _Demand, pools: Sequence[Ranks], which: Integers) -> tuple[_Demand, Integers]:
    """Demands cut into one part for each rank of their pool, so that all ranks have evenly many rows.

    The smallest pools come first: what only few may do weighs on them when larger ones are dealt out.
    """
    totals = np.bincount(which, demand.length, len(pools)).astype(np.int64).tolist()
    turns = sorted(range(len(pools)), key=lambda i: len(pools[i]))
    loads, ranks, shares = Counter[int](), list[int](), list[int]()
    for i in turns:
        parts = _levelled([loads[rank] for rank in pools[i]], totals[i])
        loads.update(dict(zip(pools[i], parts, strict=True)))
        ranks += pools[i]
        shares += parts
    turn = np.empty(len(pools), np.int64)
    turn[turns] = np.arange(len(pools))
    width = int(max(demand.target.max(initial=0), demand.source.max(initial=0))) + 2
    sort = order((turn[which] * width + demand.target + 1) * width + demand.source + 1)
    length = demand.length[sort]
    ends, limits = np.cumsum(length), np.cumsum(np.array(shares, np.int64))
    at = np.searchsorted(ends, limits)
    inside = np.flatnonzero(ends[at] != limits)  # limits that cut a demand
    stops = np.insert(ends, at[inside], limits[inside])
    of = np.repeat(np.arange(len(ends)), np.bincount(at[inside], minlength=len(ends)) + 1)
    parts = np.diff(np.searchsorted(stops, limits, "right"), prepend=0)
    starts = np.append(0, stops[:-1])
    part = demand.at(sort[of])
    skip = part.skip + starts - (ends - length)[of]
    return part._replace(skip=skip, length=stops - starts), np.repeat(np.array(ranks, np.int64), parts)


def _levelled(loads: Sequence[int], more: int) -> list[int]:
    """``more`` dealt out so that the greatest load is as small as can be."""
    ranked = sorted(range(len(loads)), key=loads.__getitem__)
    below = level = used = 0
    for used, i in enumerate(ranked, 1):
        below += loads[i]
        level = (below + more) // used
        if used == len(ranked) or level <= loads[ranked[used]]:
            break
    dealt = [max(0, level - load) for load in loads]
    rest = more - sum(dealt)  # less than one for each
    for i in ranked[:used][:rest]:
        dealt[i] += 1
    return dealt
