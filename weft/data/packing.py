"""Whole documents into windows of limited length, in an order that a seed and an epoch decide alone."""

from bisect import bisect_right, insort
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
from jaxtyping import Int64, Integer

from weft.config.errors import DataError


@dataclass(frozen=True)
class Windows:
    """Which documents each window has: those of ``documents`` from ``ends[i - 1]`` to ``ends[i]``."""

    documents: Int64[np.ndarray, " documents"]
    ends: Int64[np.ndarray, " windows"]

    def __len__(self) -> int:
        return len(self.ends)

    def window(self, number: int) -> list[int]:
        """The documents of one window, in order."""
        first = int(self.ends[number - 1]) if number else 0
        return self.documents[first : int(self.ends[number])].tolist()


def shuffled(count: int, seed: int, key: str, epoch: int) -> Int64[np.ndarray, " documents"]:
    """A random order of ``range(count)``, the same wherever and whenever it is asked for."""
    digest = blake2b(f"{seed}/{key}/{epoch}".encode(), digest_size=16).digest()
    draws = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(np.atleast_1d(np.asarray(draws)), kind="stable").astype(np.int64)


class _Waiting:
    """Documents that have arrived and are in no window yet, by arrival and by length."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}  # in the order of arrival
        self._sorted: list[tuple[int, int]] = []  # (tokens, -arrival): of equal ones the earlier is last

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, arrival: int, size: int) -> None:
        self._sizes[arrival] = size
        insort(self._sorted, (size, -arrival))

    def oldest(self) -> tuple[int, int]:
        """Take the one that waits longest: its tokens and arrival."""
        arrival = next(iter(self._sizes))
        return self._take(bisect_right(self._sorted, (self._sizes[arrival], -arrival)) - 1)

    def longest(self, room: int) -> tuple[int, int] | None:
        """Take the longest that fits, if any does."""
        place = bisect_right(self._sorted, (room, 1)) - 1
        return self._take(place) if place >= 0 else None

    def _take(self, place: int) -> tuple[int, int]:
        size, arrival = self._sorted.pop(place)
        del self._sizes[-arrival]
        return size, -arrival


def pack(
    lengths: Integer[np.ndarray, " documents"],
    order: Int64[np.ndarray, " documents"],
    most: int,
    lookahead: int = 1,
) -> Windows:
    """Windows of at most ``most`` tokens; every document once.

    Of ``lookahead`` documents that wait, in the order given, a window takes the one that waits longest, then
    again and again the longest that fits (of equal ones the earlier). With a lookahead of 1 the order stays.

    Raises:
        DataError: a document is longer.
    """
    if len(lengths) and int(lengths.max()) > most:
        fix = "raise data.seq_length, or leave such samples out with data.overlong=skip"
        raise DataError(f"a sample has {int(lengths.max())} tokens, but sequences have {most}; {fix}")
    waiting, arriving = _Waiting(), iter(enumerate(lengths[order].tolist()))

    def fill() -> bool:
        for arrival, size in islice(arriving, lookahead - len(waiting)):
            waiting.add(arrival, size)
        return len(waiting) > 0

    packed, ends = list[int](), list[int]()
    while fill():
        taken, room = waiting.oldest(), most
        while taken:
            size, arrival = taken
            packed.append(arrival)
            room -= size
            fill()
            taken = waiting.longest(room)
        ends.append(len(packed))
    return Windows(order[np.asarray(packed, np.int64)], np.asarray(ends, np.int64))
