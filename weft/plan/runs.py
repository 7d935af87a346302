"""Runs of tokens over ranks: who holds which, what goes where, what sees what; never one row at a time.

A holding is the runs of one rank, in order and apart from each other; its rows are the runs' tokens one after
another. Tokens are counted in a pack of documents (``lengths``) that several ranks share.

Work is the number of keys that queries see: ``n (n + 1) / 2`` in a document of n tokens.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise, product
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


@lru_cache(maxsize=64)
def _parts(lengths: tuple[int, ...], holding: Holding) -> list[_Part]:
    ends, row = _ends(lengths), 0
    parts: list[_Part] = []
    for run in holding:
        start, document = run.start, bisect_right(ends, run.start) - 1
        while start < run.stop:
            stop = min(run.stop, ends[document + 1])
            if stop > start:
                parts.append(_Part(document, start, stop, row))
            row, start, document = row + stop - start, stop, document + 1
    return parts


def work(lengths: Sequence[int], holding: Holding) -> int:
    """Keys that the queries of a holding see in all."""
    ends = _ends(tuple(lengths))

    def below(tokens: int) -> int:
        return tokens * (tokens + 1) // 2

    parts = _parts(tuple(lengths), holding)
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
        shares = list(zip(self.tokens, self.work, self.ranks, strict=True))
        least = min(shares)
        if least[1] > work:
            least = min((share for share in shares if share[1] <= work), default=least)
        return least[2] if least[0] <= tokens and least[1] <= work else None

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
        order = sorted(self.ranks, key=level.__getitem__, reverse=True)  # the lowest last: it has the middle
        for rank in order[:-1]:
            if part := pairs[rank]:
                self.runs[rank] += Run(first, part), Run(stop - part, part)
                self.tokens[rank] += 2 * part
                first, stop = first + part, stop - part
            self.work[rank] = level[rank]
        self._give(order[-1], first, stop - first, (stop - first) * (length + 1) // 2)

    def _levelled(self, items: int, keys: int) -> list[int]:
        """``items`` of ``keys`` work each, dealt out so that the heaviest rank is as light as can be."""
        order = sorted(self.ranks, key=self.work.__getitem__)
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
    stop = -1
    for run in runs:
        if run.start == stop:
            out[-1] = Run(out[-1].start, out[-1].length + run.length)
        else:
            out.append(run)
        stop = run.start + run.length
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
    parts, holders = tuple(chain(*here)), [rank for rank in ranks if here[rank]]
    kept: Counter[tuple[int, int]] = Counter()
    for share, own in enumerate(shares):
        for part, _, _, length in _overlaps(own, parts):
            kept[share, holders[part]] += length
    # Of equal ones the last ranks first: those whose queries see most hold the keys that are seen least.
    order = sorted(kept, key=lambda pair: (-kept[pair], pair[0], -pair[1]))
    free, owned = set(ranks), dict[int, int]()  # shares; share of each rank
    for share, rank in chain(order, product(ranks, reversed(ranks))):
        if share in free and rank not in owned:
            free.remove(share)
            owned[rank] = share
    return tuple(shares[owned[rank]] for rank in ranks)


def route(have: Sequence[Holding], want: Sequence[Holding], rank: int) -> Route:
    """How rows go from the holdings ``have`` to the holdings ``want``, seen by ``rank``.

    Both ends take the rows that two ranks exchange in the order of the pack.
    """
    return Route(
        tuple(rows(have[rank], other) for other in want), tuple(rows(want[rank], other) for other in have)
    )


def _overlaps(mine: Holding, other: Holding) -> Iterator[tuple[int, int, int, int]]:
    """Tokens that both have, in order: the number of the other's run, my row, the first token, how many."""
    i = row = 0
    for start, length in mine:
        stop = start + length
        while i < len(other):
            begin, size = other[i]
            end = begin + size
            if begin < stop and start < end:
                first = max(start, begin)
                yield i, row + first - start, first, min(stop, end) - first
            if end > stop:  # it may reach into my next run
                break
            i += 1
        row += length


def rows(holding: Holding, tokens: Holding) -> Holding:
    """The rows of a holding at which it has these tokens."""
    return joined(Run(row, length) for _, row, _, length in _overlaps(holding, tokens))


def common(one: Holding, other: Holding) -> Holding:
    """The tokens that both have."""
    return joined(Run(first, length) for _, _, first, length in _overlaps(one, other))


def seen(lengths: Sequence[int], queries: Holding) -> Holding:
    """The tokens of the pack that some query sees: from the first of its document on."""
    ends = _ends(tuple(lengths))
    out: list[Run] = []
    stop = -1
    for run in queries:
        first = ends[bisect_right(ends, run.start) - 1]
        if first <= stop:
            first = out.pop().start
        stop = run.start + run.length
        out.append(Run(first, stop - first))
    return tuple(out)


def pieces(lengths: Sequence[int], queries: Holding, keys: Holding) -> tuple[Piece, ...]:
    """The blocks of rows of two holdings in which queries see keys, in the order of the queries."""
    ends = _ends(tuple(lengths))
    starts, stops = [run.start for run in keys], [run.stop for run in keys]
    places = list(accumulate((run.length for run in keys), initial=0))
    out: list[Piece] = []
    for document, start, stop, row in _parts(tuple(lengths), queries):
        for i in range(bisect_right(stops, ends[document]), bisect_left(starts, stop)):
            first = max(ends[document], starts[i])  # key
            skipped = max(0, first - start)  # queries before it
            block = Run(places[i] + first - starts[i], min(stop, stops[i]) - first)
            out.append(Piece(Run(row + skipped, stop - start - skipped), block, start + skipped - first))
    return tuple(out)


def shared(lengths: Sequence[int], holdings: Sequence[Holding]) -> bool:
    """Whether some document has tokens on two ranks, which hold the whole pack."""
    starts = set(_ends(tuple(lengths)))
    return any(run.start not in starts for holding in holdings for run in holding)
