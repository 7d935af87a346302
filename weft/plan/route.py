"""Static routes of token rows between ranks: between stages, modules, orders of tokens.

An end of a route says which global rows each rank has or wants, as runs. It is ``unique`` where each row is
on one rank, or ``replicated`` where several ranks may have it, with the same values. A compiled route is a
linear map: every row that a rank wants is written once, from one of the ranks that have it. Its transpose,
for gradients, adds up in each row what comes back from all to which that row went.

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

from weft.plan.runs import Holding, Run, joined
from weft.plan.sweep import groups_of, rows_of, runs_of, sizes_of, table_of

Kind = Literal["unique", "replicated"]


@dataclass(frozen=True)
class End:
    """One end of a route.

    Attributes:
        holdings: by world rank, runs of global rows in the order in which the rank has them, no row twice.
        kind: whether several ranks may have a row.
    """

    holdings: Mapping[int, Holding]
    kind: Kind = "unique"


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
    def links(self) -> Mapping[tuple[int, int], int]:
        """Rows that travel, by source and target; what stays where it is does not count."""
        totals: defaultdict[tuple[int, int], int] = defaultdict(int)
        for source, _, target, _, length in self.table.tolist():
            if source != target:
                totals[source, target] += length
        return dict(totals)

    def party(self, rank: int) -> tuple[int, ...]:
        """Ranks connected with this one, itself included: those that send, then the others."""
        pairs = set(zip(self.table[:, 0].tolist(), self.table[:, 2].tolist(), strict=True))
        peers: defaultdict[int, set[int]] = defaultdict(set)
        for source, target in pairs:
            peers[source].add(target)
            peers[target].add(source)
        found, edge = {rank}, [rank]
        while edge:
            new = peers[edge.pop()] - found
            found |= new
            edge += new
        sending = {source for source, _ in pairs}
        return tuple(sorted(found, key=lambda one: (one not in sending, one)))


def compile_route(source: End, target: End, near: Callable[[int], int] | None = None) -> Route:
    """The route from what ranks have to what ranks want; rows that nobody wants stay where they are.

    A row comes from its target itself if that has it, else from a rank on the same node, else from any; among
    several, all send evenly many rows, in as few parts as that allows.

    Args:
        source: who has which rows.
        target: who wants which rows.
        near: the node of a rank; without it all ranks are as near as each other.

    Raises:
        ValueError: a row that is wanted is nowhere, twice on a rank, or on two ranks of a unique end.
    """
    unique = source.kind == "unique"
    each = {rank: (rank,) for rank in target.holdings}
    groups = {rank: (rank,) for rank in source.holdings} if unique else groups_of(source.holdings)
    have = runs_of({rank: source.holdings[rank] for rank in groups}, "source", unique)
    want = runs_of(target.holdings, "target", target.kind == "unique")
    table = _merged(_sorted(table_of(have, groups, want, near)))
    return Route(table, sizes_of(have, groups), sizes_of(want, each))


@lru_cache(maxsize=256)
def transpose(route: Route) -> Route:
    """The way back: what went from one row to several comes back as so many summands."""
    return Route(_sorted(route.table[:, [2, 3, 0, 1, 4]]), route.targets, route.sources)


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


def _sorted(table: np.ndarray) -> np.ndarray:
    """By target, source and place as one number: 64 bits hold 10^5 ranks of each with 10^8 rows."""
    ranks, rows = table[:, 0].max(initial=0) + 1, table[:, 3].max(initial=0) + 1
    return table[np.argsort((table[:, 2] * ranks + table[:, 0]) * rows + table[:, 3])]


def _merged(table: np.ndarray) -> np.ndarray:
    """Legs that continue one another, on both ends, joined."""
    if not len(table):
        return table
    before, after = table[:-1], table[1:]
    same = (before[:, [0, 2]] == after[:, [0, 2]]).all(1)
    same &= (before[:, [1, 3]] + before[:, 4:] == after[:, [1, 3]]).all(1)
    first = np.flatnonzero(np.concatenate([np.ones(1, np.bool_), ~same]))
    joint = table[first]
    joint[:, 4] = np.add.reduceat(table[:, 4], first)
    return joint


def check_route(route: Route, source: End, target: End) -> Mapping[tuple[int, int], int]:
    """Prove a compiled route row by row: each row written once, with what was wanted, and nothing needless.

    Returns:
        Rows that travel over each link, by source and target.

    Raises:
        ValueError: a row that a rank wants is written never or twice, or from another row, or it travels
            although its target has it.
    """
    have = {rank: rows_of(rows) for rank, rows in source.holdings.items()}
    want = {rank: rows_of(rows) for rank, rows in target.holdings.items()}
    written = {rank: np.zeros(len(rows), np.int64) for rank, rows in want.items()}
    travelled = dict.fromkeys(want, 0)
    for leg in route.legs:
        sent = have[leg.source][leg.start : leg.start + leg.length]
        got = want[leg.target][leg.place : leg.place + leg.length]
        if not leg.length == len(sent) == len(got) or (sent != got).any():
            raise ValueError(f"{leg} brings rows {sent} where {got} are wanted")
        written[leg.target][leg.place : leg.place + leg.length] += 1
        travelled[leg.target] += leg.length if leg.source != leg.target else 0
    for rank, times in written.items():
        if (times != 1).any():
            i = int((times != 1).argmax())
            raise ValueError(f"row {want[rank][i]} that rank {rank} wants is written {times[i]} times")
        lacks = len(np.setdiff1d(want[rank], have.get(rank, want[rank][:0])))
        if travelled[rank] != lacks:
            raise ValueError(f"rank {rank} receives {travelled[rank]} rows but lacks only {lacks}")
    return route.links
