"""Static routes of token rows between ranks: between stages, modules, orders of tokens.

An end of a route says which global rows each rank has or wants, as runs. Where several ranks have a row it is
``replicated``, the same on all of them, or ``partial``, the sum of what they have; else it is ``unique``. A
compiled route is a linear map: every row that is wanted is written once, from one rank that has it, or from
each of them where they are summands; a partial row is written on one of the ranks that want it, and zero on
the others. Its transpose carries gradients back, and is a route of the same kind: the gradient of a value on
several ranks is a sum over them, and that of a summand is the same for all summands.

Routes are compiled on the host, from runs, before anything travels; only ``check_route``, the slow twin,
looks at each row.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from weft.plan.holders import Holders, Integers, checked, flat, grouped, order, spread
from weft.plan.runs import Holding, Run, joined
from weft.plan.sweep import ordered, table_of

Kind = Literal["unique", "replicated", "partial"]


class End:
    """One end of a route.

    Args:
        holdings: by world rank, runs of global rows in the order in which the rank has them, no row twice.
        kind: whether several ranks may have a row, and then whether it is the same on each or their sum.
    """

    def __init__(self, holdings: Mapping[int, Holding], kind: Kind = "unique") -> None:
        self.kind: Kind = kind
        if kind == "unique":
            ranks = sorted(holdings)
            members, parts = [(rank,) for rank in ranks], [holdings[rank] for rank in ranks]
        else:
            groups = grouped(holdings)
            members, parts = list(groups.values()), list(groups)
        self.holders = Holders.of(members, [len(part) for part in parts], *flat(parts).T)

    @classmethod
    def of(cls, rank: Integers, start: Integers, length: Integers, kind: Kind = "unique") -> "End":
        """An end from columns, one item for each run: its world rank, first global row, and rows.

        Runs of a rank stand in the order in which it has them; one without rows says that the rank is there.
        """
        if (rank[1:] < rank[:-1]).any():
            sort = order(rank)
            rank, start, length = rank[sort], start[sort], length[sort]
        first = np.flatnonzero(np.diff(rank, prepend=-1))
        stop = np.append(first, len(rank))[1:]
        members = [(one,) for one in rank[first].tolist()]
        if kind != "unique":
            parts = zip(members, first.tolist(), stop.tolist(), strict=True)
            groups = grouped({one: start[i:j].tobytes() + length[i:j].tobytes() for (one,), i, j in parts})
            members = list(groups.values())
            chosen = np.searchsorted(rank[first], [ranks[0] for ranks in members])
            first, stop = first[chosen], stop[chosen]
            runs = spread(first, stop)[1]
            start, length = start[runs], length[runs]
        end = cls({}, kind)
        end.holders = Holders.of(members, (stop - first).tolist(), start, length)
        return end

    @cached_property
    def holdings(self) -> Mapping[int, Holding]:
        """By world rank, its runs, for people and tests."""
        runs: list[list[Run]] = [list[Run]() for _ in self.holders.members]
        groups: list[int] = self.holders.group.tolist()
        starts, lengths = self.holders.start.tolist(), self.holders.length.tolist()
        for group, start, length in zip(groups, starts, lengths, strict=True):
            runs[group].append(Run(start, length))
        own = zip(self.holders.members, map(tuple, runs), strict=True)
        return dict(sorted((rank, part) for ranks, part in own for rank in ranks))

    @property
    def dual(self) -> "End":
        """This end as gradients see it: of replicas they are summands, of summands replicas."""
        kinds: Mapping[Kind, Kind] = {"replicated": "partial", "partial": "replicated", "unique": "unique"}
        end = End({}, kinds[self.kind])
        end.holders = self.holders
        return end


class Leg(NamedTuple):
    """``length`` rows of ``source`` from its row ``start`` on go to ``target``, from its row ``place`` on."""

    source: int
    start: int
    target: int
    place: int
    length: int


class Share(NamedTuple):
    """What one rank does for a route; in each pair of ranks both ends take the rows in the same order.

    Attributes:
        sends: rows of ours that go to each rank, ourselves included.
        receives: rows of ours into which come those of each rank, ourselves included, ranks ascending.
        have: rows that we have as a source.
        want: rows that we have as a target.
        whole: whether something comes into every row.
        once: whether nothing comes into a row twice.
    """

    sends: Mapping[int, Holding]
    receives: Mapping[int, Holding]
    have: int
    want: int
    whole: bool
    once: bool


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows go where.

    Attributes:
        table: of each leg the fields of ``Leg``; ascending by target, source and place.
        sources: rows of each source.
        targets: rows of each target.
    """

    table: Int64[np.ndarray, "legs 5"]
    sources: Mapping[int, int]
    targets: Mapping[int, int]

    @cached_property
    def legs(self) -> tuple[Leg, ...]:
        """The table, for people and tests."""
        return tuple(Leg(*row) for row in self.table.tolist())

    @cached_property
    def _pairs(self) -> Mapping[tuple[int, int], int]:
        """Rows from each source to each target, which may be the same."""
        source, target, width = self.table[:, 0], self.table[:, 2], int(self.table[:, 2].max(initial=0)) + 1
        keys, which = np.unique(source * width + target, return_inverse=True)
        rows = np.bincount(which, self.table[:, 4], len(keys)).astype(np.int64).tolist()
        return {divmod(key, width): n for key, n in zip(keys.tolist(), rows, strict=True)}

    @cached_property
    def links(self) -> Mapping[tuple[int, int], int]:
        """Rows that travel, by source and target; what stays where it is does not count."""
        return {pair: rows for pair, rows in self._pairs.items() if pair[0] != pair[1]}

    @cached_property
    def _peers(self) -> Mapping[int, set[int]]:
        """The ranks that each exchanges with, in either direction."""
        peers: defaultdict[int, set[int]] = defaultdict(set)
        for source, target in self._pairs:
            peers[source].add(target)
            peers[target].add(source)
        return dict(peers)

    def party(self, rank: int) -> tuple[int, ...]:
        """Ranks connected with this one, itself included: those that send, then the others."""
        found, edge = {rank}, [rank]
        while edge:
            new = self._peers.get(edge.pop(), set()) - found
            found |= new
            edge += new
        sending = {source for source, _ in self._pairs}
        return tuple(sorted(found, key=lambda one: (one not in sending, one)))


def compile_route(source: End, target: End, near: Callable[[int], int] | None = None) -> Route:
    """The route from what ranks have to what ranks want; rows that nobody wants stay where they are.

    Where one of several ranks is to send a row, or to take it, it is one that is at both ends, else one on
    the same node as the other end, else any; among several, all have evenly many rows, in as few parts as
    that allows. Between two partial ends each summand goes to one rank of its own.

    Args:
        source: who has which rows.
        target: who wants which rows.
        near: the node of a rank; without it all ranks are as near as each other.

    Raises:
        ValueError: a row that is wanted is nowhere, twice on a rank, or on two ranks of a unique end.
    """
    have = checked(source.holders, "source", source.kind == "unique")
    want = checked(target.holders, "target", target.kind == "unique")
    every = source.kind == "partial", target.kind != "partial"
    return Route(table_of(have, want, every, near), source.holders.sizes(), target.holders.sizes())


@lru_cache(maxsize=256)
def transpose(route: Route) -> Route:
    """The way back: what went from one row to several comes back as so many summands."""
    return Route(ordered(route.table.T[[2, 3, 0, 1, 4]]).T, route.targets, route.sources)


@lru_cache(maxsize=1024)
def share(route: Route, rank: int) -> Share:
    """What a rank does for a route."""
    table = route.table
    sends = _by_peer(table[table[:, 0] == rank][:, [2, 1, 4]])
    receives = _by_peer(table[table[:, 2] == rank][:, [0, 3, 4]])
    want, at = route.targets.get(rank, 0), 0
    whole = once = True
    for run in sorted(chain(*receives.values())):
        whole, once = whole and run.start <= at, once and run.start >= at
        at = max(at, run.stop)
    return Share(sends, receives, route.sources.get(rank, 0), want, whole and at >= want, once)


def _by_peer(legs: np.ndarray) -> dict[int, Holding]:
    """Runs of legs of peer, first row, length."""
    runs: defaultdict[int, list[Run]] = defaultdict(list)
    for peer, start, length in legs.tolist():
        runs[peer].append(Run(start, length))
    return {peer: joined(runs[peer]) for peer in sorted(runs)}


def check_route(route: Route, source: End, target: End) -> Mapping[tuple[int, int], int]:
    """Prove a compiled route row by row: what was wanted is written once, and nothing travels needlessly.

    A cell is a row, a rank that has it and one that wants it. One cell must be used of all those of a row;
    of those of each summand where the source is partial; of those of each target unless that is partial. It
    travels only if none of them is on one rank. Takes rows x sources x targets bytes of memory.

    Returns:
        Rows that travel over each link, by source and target.

    Raises:
        ValueError: a row is written never or twice, or from another row, or travels although it need not.
    """
    sources, targets = list(route.sources), list(route.targets)
    have = {rank: source.holders.rows(rank) for rank in sources}
    want = {rank: target.holders.rows(rank) for rank in targets}
    rows = max((int(own.max(initial=-1)) + 1 for own in chain(have.values(), want.values())), default=0)
    has, wants = np.zeros((rows, len(sources)), np.bool_), np.zeros((rows, len(targets)), np.bool_)
    for side, ranks, held in ((has, sources, have), (wants, targets, want)):
        for place, rank in enumerate(ranks):
            side[held[rank], place] = True
    used = np.zeros((rows, len(sources), len(targets)), np.int8)
    for leg in route.legs:
        sent = have[leg.source][leg.start : leg.start + leg.length]
        got = want[leg.target][leg.place : leg.place + leg.length]
        if not leg.length == len(sent) == len(got) or (sent != got).any():
            raise ValueError(f"{leg} brings rows {sent} where {got} are wanted")
        used[got, sources.index(leg.source), targets.index(leg.target)] += 1
    nowhere = wants.any(1) & ~has.any(1)
    if nowhere.any():
        raise ValueError(f"row {int(nowhere.argmax())} is wanted, but nowhere")
    over = (1,) * (source.kind != "partial") + (2,) * (target.kind == "partial")
    cells = has[:, :, None] & wants[:, None, :]
    needed, times = cells.any(over, keepdims=True), used.sum(over, keepdims=True)
    if (times != needed).any():
        row, at, to = np.argwhere(times != needed)[0].tolist()
        told = f"row {row}" + f" of rank {sources[at]}" * (1 not in over)
        told += f" that rank {targets[to]} wants" * (2 not in over)
        raise ValueError(f"{told} is written {times[row, at, to]} times")
    here = np.array(sources)[:, None] == np.array(targets)
    least = int((needed & ~(cells & here).any(over, keepdims=True)).sum())
    travelled = sum(route.links.values())
    if travelled != least:
        raise ValueError(f"{travelled} rows travel although {least} would do")
    return route.links
