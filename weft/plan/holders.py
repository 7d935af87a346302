"""The runs that ranks have of global rows, as columns of numbers: an end of a route.

Ranks with equal runs are one group, so that replicas cost nothing.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64

from weft.plan.runs import Run

Integers = Int64[np.ndarray, "..."]
Ranks = tuple[int, ...]
BITS = 62  # that a positive number has
_Key = TypeVar("_Key", bound=Hashable)


class Holders(NamedTuple):
    """The runs of an end.

    Attributes:
        members: ranks of each group; all of a group have the same.
        group: of each run; runs of a group follow one another, in the order of its rows.
        start: the first global row of a run.
        length: its rows.
        place: local row of the first.
    """

    members: tuple[Ranks, ...]
    group: Integers
    start: Integers
    length: Integers
    place: Integers

    @classmethod
    def of(
        cls, members: Sequence[Ranks], counts: Sequence[int], start: Integers, length: Integers
    ) -> "Holders":
        """Groups with so many runs each, one group after another."""
        many = np.array(counts, np.int64)
        rows = np.zeros(len(length) + 1, np.int64)
        np.cumsum(length, out=rows[1:])
        place = rows[:-1] - np.repeat(rows[np.cumsum(many) - many], many)
        group = np.repeat(np.arange(len(many)), many)
        return cls(tuple(members), group, start, length, place)

    def sizes(self) -> dict[int, int]:
        """Rows of every rank."""
        rows = np.bincount(self.group, self.length, len(self.members)).astype(np.int64).tolist()
        return {rank: n for ranks, n in zip(self.members, rows, strict=True) for rank in ranks}

    def rows(self, rank: int) -> Int64[np.ndarray, " rows"]:
        """Every global row that a rank has, in its order; none of a rank that is not here."""
        own = self.group == next((i for i, ranks in enumerate(self.members) if rank in ranks), -1)
        return spread(self.start[own], self.start[own] + self.length[own])[1]


def grouped(parts: Mapping[int, _Key]) -> dict[_Key, Ranks]:
    """The ranks that have one and the same part."""
    same: dict[_Key, list[int]] = {}
    known: dict[int, list[int]] = {}  # by identity, which is found without a look at the runs
    for rank in sorted(parts):
        part = parts[rank]
        if id(part) not in known:
            known[id(part)] = same.setdefault(part, [])
        known[id(part)].append(rank)
    return {part: tuple(ranks) for part, ranks in same.items()}


def flat(holdings: Iterable[Sequence[Run]]) -> Int64[np.ndarray, "runs 2"]:
    """Start and length of all runs, one after another."""
    return np.fromiter(chain.from_iterable(chain.from_iterable(holdings)), np.int64).reshape(-1, 2)


def rows_of(holding: Sequence[Run]) -> Int64[np.ndarray, " rows"]:
    """Every row of a holding, in its order."""
    start, length = flat([holding]).T
    return spread(start, start + length)[1]


def order(keys: Integers) -> Integers:
    """What sorts numbers from 0 on, equal ones as they are.

    Numbers that leave room for their index are sorted with it, which is several times faster than argsort.
    """
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits > BITS:
        return np.argsort(keys, kind="stable")
    packed = keys << bits
    packed |= np.arange(len(keys))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def checked(end: Holders, name: str, unique: bool) -> Holders:
    """The runs that have rows: of a unique end by their starts, else of each group by their starts.

    Raises:
        ValueError: a row is twice on a rank, or on two ranks of a unique end.
    """
    keys = end.start if unique else end.group * (int(end.start.max(initial=0)) + 1) + end.start
    runs = order(keys)
    if not end.length.all():
        runs = runs[end.length[runs] > 0]
    sort = Holders(end.members, *(column[runs] for column in end[1:]))
    stop = sort.start + sort.length
    twice = sort.start[1:] < stop[:-1]
    if not unique:
        twice &= sort.group[1:] == sort.group[:-1]
    if twice.any():
        i = int(twice.argmax())
        one, other = sorted(end.members[int(which)][0] for which in sort.group[i : i + 2])
        where = f"rank {one} of the {name}, twice"
        if one < other:
            where = f"ranks {one} and {other} of a unique {name}"
        raise ValueError(f"rows {sort.start[i + 1]} to {min(stop[i], stop[i + 1]) - 1} are on {where}")
    return sort


def spread(first: Integers, last: Integers) -> tuple[Integers, Integers]:
    """Of each pair the integers from ``first`` to before ``last``: the number of the pair, the integer."""
    counts = last - first
    ends = np.cumsum(counts)
    values = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts - first, counts)
    return np.repeat(np.arange(len(counts)), counts), values
