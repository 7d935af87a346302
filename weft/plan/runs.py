"""Runs of tokens over ranks: who holds which, what goes where, what sees what; never one row at a time.

A holding is the runs of one rank, in order and apart from each other; its rows are the runs' tokens one after
another. Tokens are counted in a pack of documents (``lengths``) that several ranks share.

Work is the number of keys that queries see: ``n (n + 1) / 2`` in a document of n tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, product
from typing import NamedTuple

SLACK = 20  # a rank may have 1/SLACK more than the mean before documents are cut to avoid it
KEPT = 10  # a contiguous cut whose heaviest rank has at most 1/KEPT more work than the mean is left alone


class Run(NamedTuple):
    """``length`` tokens, or rows, from ``start`` on."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last."""
        return self.start + self.length


Holding = tuple[Run, ...]


class Piece(NamedTuple):
    """Query i of ``queries`` sees the keys j <= i + ``diagonal`` of ``keys``; both are runs of rows.

    ``diagonal`` is at least 0, so that every query sees a key.
    """

    queries: Run
    keys: Run
    diagonal: int


class Route(NamedTuple):
    """Rows of one rank that go to each rank, and rows where those of each rank arrive."""

    send: tuple[Holding, ...]
    receive: tuple[Holding, ...]


def count(holding: Iterable[Run]) -> int:
    """Rows of a holding."""
    return sum(run.length for run in holding)


def contiguous(counts: Sequence[int]) -> tuple[Holding, ...]:
    """The holdings of ranks that have so many tokens each, in order."""
    ends = accumulate(counts, initial=0)
    return tuple((Run(start, stop - start),) if stop > start else () for start, stop in pairwise(ends))


class _Part(NamedTuple):
    """What a run has of one document: tokens from ``start`` to ``stop``, at row ``row`` of the holding."""

    document: int
    start: int
    stop: int
    row: int


@lru_cache(maxsize=64)
def _ends(lengths: tuple[int, ...]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def _parts(lengths: Sequence[int], holding: Holding) -> Iterator[_Part]:
    ends, row = _ends(tuple(lengths)), 0
    for run in holding:
        start, document = run.start, bisect_right(ends, run.start) - 1
        while start < run.stop:
            stop = min(run.stop, ends[document + 1])
            if stop > start:
                yield _Part(document, start, stop, row)
            row, start, document = row + stop - start, stop, document + 1


def work(lengths: Sequence[int], holding: Holding) -> int:
    """Keys that the queries of a holding see in all."""
    ends = _ends(tuple(lengths))

    def below(tokens: int) -> int:
        return tokens * (tokens + 1) // 2

    parts = _parts(lengths, holding)
    return sum(below(p.stop - ends[p.document]) - below(p.start - ends[p.document]) for p in parts)


class _Shares:
    """Tokens and work dealt out so far."""

    def __init__(self, lengths: Sequence[int], ranks: int) -> None:
        self.ranks = range(ranks)
        self.tokens, self.work = [0] * ranks, [0] * ranks
        self.runs: list[list[Run]] = [[] for _ in self.ranks]
        self._all_tokens, self._all_work = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)

    def _give(self, rank: int, start: int, length: int, keys: int) -> None:
        if length:
            self.runs[rank].append(Run(start, length))
        self.tokens[rank] += length
        self.work[rank] += keys

    def fits(self, length: int) -> int | None:
        """The rank for a whole document: that with the fewest tokens of those with room for it."""
        ranks, keys = len(self.ranks), length * (length + 1) // 2
        small = keys * ranks * SLACK <= self._all_work
        # A document with more work per token than the pack would leave its rank with too few tokens.
        if not small and keys * self._all_tokens * SLACK > length * self._all_work * (SLACK + 1):
            return None
        most = 1 + 1 / SLACK
        work, tokens = most * self._all_work / ranks - keys, most * self._all_tokens / ranks - length
        room = [rank for rank in self.ranks if self.work[rank] <= work and self.tokens[rank] <= tokens]
        return min(room, key=lambda rank: (self.tokens[rank], self.work[rank]), default=None)

    def whole(self, rank: int, start: int, length: int) -> None:
        """Give a document to one rank."""
        self._give(rank, start, length, length * (length + 1) // 2)

    def cut(self, start: int, length: int) -> None:
        """Deal a document out in pairs of its i-th token from both ends, which cost the same for every i.

        Ranks are filled up to a common level of work; one that has more already gets nothing.
        """
        pairs = self._levelled(length // 2, length + 1)
        level = [work + n * (length + 1) for work, n in zip(self.work, pairs, strict=True)]
        first, stop = start, start + length
        order = sorted(self.ranks, key=lambda rank: -level[rank])  # the lowest last: it has the middle
        for rank in order[:-1]:
            self._give(rank, first, pairs[rank], 0)
            self._give(rank, stop - pairs[rank], pairs[rank], pairs[rank] * (length + 1))
            first, stop = first + pairs[rank], stop - pairs[rank]
        self._give(order[-1], first, stop - first, (stop - first) * (length + 1) // 2)

    def _levelled(self, items: int, keys: int) -> list[int]:
        """``items`` of ``keys`` work each, dealt out so that the heaviest rank is as light as can be."""
        order = sorted(self.ranks, key=lambda rank: self.work[rank])
        below, level = 0, 0
        for n, rank in enumerate(order, 1):
            below += self.work[rank]
            level = (below + items * keys) // n
            if n == len(order) or level <= self.work[order[n]]:
                break
        dealt = [max(0, level - work) // keys for work in self.work]
        order.sort(key=lambda rank: self.work[rank] + dealt[rank] * keys)
        for i in range(items - sum(dealt)):  # about one for each at most
            dealt[order[i % len(order)]] += 1
        return dealt


def balanced(lengths: Sequence[int], ranks: int) -> tuple[Holding, ...]:
    """What each rank should hold so that causal work is even, and tokens nearly so.

    A document goes to one rank where there is room for it. Others are cut in zigzag: each rank has a part
    from the front and one as long from the back, and parts of one length make equal work. No rank has more
    work than the mean plus the greater of 5% of it and one token pair of the longest document (its length
    + 1): within 10% of the mean wherever the longest document has at most a tenth of the mean's keys.
    """
    shares = _Shares(lengths, ranks)
    ends = _ends(tuple(lengths))
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = shares.fits(lengths[document])
        if rank is None:
            shares.cut(ends[document], lengths[document])
        else:
            shares.whole(rank, ends[document], lengths[document])
    return tuple(joined(sorted(runs)) for runs in shares.runs)


def joined(runs: Iterable[Run]) -> Holding:
    """The same rows in the same order, in as few runs as possible."""
    out: list[Run] = []
    for run in runs:
        if out and out[-1].stop == run.start:
            out[-1] = Run(out[-1].start, out[-1].length + run.length)
        else:
            out.append(run)
    return tuple(out)


@lru_cache(maxsize=64)
def arranged(lengths: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Holding, ...]:
    """Where attention has the tokens: as they lie where that is balanced, else ``balanced``.

    The balanced shares are given to the ranks that hold most of them already.
    """
    here, ranks = contiguous(counts), range(len(counts))
    loads = [work(lengths, holding) for holding in here]
    if KEPT * len(counts) * max(loads) <= (KEPT + 1) * sum(loads):
        return here
    shares = balanced(lengths, len(counts))
    sent = [route(here, shares, rank).send for rank in ranks]
    kept = {(rank, share): count(sent[rank][share]) for rank, share in product(ranks, ranks)}
    # Of equal ones the last ranks first: those whose queries see most hold the keys that are seen least.
    order = sorted(kept, key=lambda pair: (-kept[pair], pair[1], -pair[0]))
    owner: dict[int, int] = {}  # share of each rank
    for rank, share in order:
        if rank not in owner and share not in owner.values():
            owner[rank] = share
    return tuple(shares[owner[rank]] for rank in ranks)


def route(have: Sequence[Holding], want: Sequence[Holding], rank: int) -> Route:
    """How rows go from the holdings ``have`` to the holdings ``want``, seen by ``rank``.

    Both ends take the rows that two ranks exchange in the order of the pack.
    """
    return Route(_meet(have[rank], want), _meet(want[rank], have))


def _meet(mine: Holding, others: Sequence[Holding]) -> tuple[Holding, ...]:
    """My rows that are tokens of each of the others."""
    table = sorted((run.start, run.stop, other) for other, runs in enumerate(others) for run in runs)
    starts = [start for start, _, _ in table]
    out: list[list[Run]] = [[] for _ in others]
    row = 0
    for run in mine:
        for i in range(max(0, bisect_right(starts, run.start) - 1), bisect_left(starts, run.stop)):
            first, last = max(table[i][0], run.start), min(table[i][1], run.stop)
            if first < last:
                out[table[i][2]].append(Run(row + first - run.start, last - first))
        row += run.length
    return tuple(map(joined, out))


def rows(holding: Holding, tokens: Holding) -> Holding:
    """The rows of a holding at which it has these tokens."""
    return _meet(holding, (tokens,))[0]


def seen(lengths: Sequence[int], keys: Holding, queries: Holding) -> Holding:
    """The tokens of ``keys`` that some query sees."""
    last = {part.document: part.stop for part in _parts(lengths, queries)}
    return joined(
        Run(part.start, min(part.stop, last[part.document]) - part.start)
        for part in _parts(lengths, keys)
        if last.get(part.document, 0) > part.start
    )


def pieces(lengths: Sequence[int], queries: Holding, keys: Holding) -> tuple[Piece, ...]:
    """The blocks of rows of two holdings in which queries see keys, in the order of the queries."""
    of: dict[int, list[_Part]] = {}
    for part in _parts(lengths, keys):
        of.setdefault(part.document, []).append(part)
    out: list[Piece] = []
    for query in _parts(lengths, queries):
        for key in of.get(query.document, ()):
            first, stop = max(query.start, key.start), min(query.stop, key.stop)
            if query.stop <= key.start:
                break
            rows = Run(query.row + first - query.start, query.stop - first)
            out.append(Piece(rows, Run(key.row, stop - key.start), first - key.start))
    return tuple(out)


def shared(lengths: Sequence[int], holdings: Sequence[Holding]) -> bool:
    """Whether some document has tokens on two ranks."""
    held = [{part.document for part in _parts(lengths, holding)} for holding in holdings]
    return sum(map(len, held)) > len(set[int]().union(*held))
