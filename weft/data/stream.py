"""Token streams and splits: tokenized documents seen as one run of targets.

A document of stored tokens ``t1 .. tn`` (``tn`` is the end token) has ``n`` targets; the model reads
``start t1 .. tn-1`` and predicts ``t1 .. tn``. So every stored token is predicted exactly once, none is read
without a target, and the storage is what Megatron's ``--append-eod`` writes. Place ``p`` of a stream is its
``p``-th target. In files whose documents already begin with the start token (``lead = 1``) that token is read
but not predicted.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np
from jaxtyping import Int64, Integer

from weft.data.batch import Batch, empty, join
from weft.data.indexed import Bounds
from weft.plan.shard import share


@dataclass(frozen=True)
class Stream:
    """The tokens of one source in one split.

    ``key`` names the content (a digest of tokens and boundaries), ``name`` is what the user wrote.
    ``bytes`` counts the UTF-8 text, 0 where it is not known (a tokenized training corpus).
    """

    name: str
    key: str
    data: Integer[np.ndarray, " stored"]
    bounds: Bounds
    start_token: int
    lead: int = 0
    bytes: int = 0
    longest: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """Documents, empty ones not counted as such by any writer of ours."""
        return len(self.bounds) - 1

    @property
    def tokens(self) -> int:
        """Targets, each predicted once per epoch."""
        return len(self.data) - self.lead * self.documents

    def first(self, document: int) -> int:
        """Place of the first target of a document."""
        return self.bounds[document] - self.lead * document

    def document_at(self, place: int) -> int:
        """The document that holds a place."""
        return bisect_right(range(self.documents), place, key=self.first) - 1

    def document(self, document: int) -> Int64[np.ndarray, " stored"]:
        """The stored tokens of one document."""
        return self.data[self.bounds[document] : self.bounds[document + 1]].astype(np.int64)

    def window(self, place: int, length: int, depths: int, sample: int = 0) -> Batch:
        """``length`` targets from ``place`` on, each segment in one document; past the end it starts over."""
        tokens = np.empty(length, np.int64)
        future = np.full((depths + 1, length), -1, np.int64)
        lengths: list[int] = []
        done, document = 0, self.document_at(place)
        while done < length:
            count = min(self.first(document + 1) - place, length - done)
            if count:
                self._fill(tokens[done : done + count], future[:, done : done + count], place, document)
                lengths.append(count)
            done, place, document = done + count, place + count, document + 1
            if document == self.documents:
                place, document = 0, 0
        return Batch(tokens, future, future >= 0, tuple(lengths), (sample,))

    def _fill(self, tokens: np.ndarray, future: np.ndarray, place: int, document: int) -> None:
        """Write one segment: ``tokens[count]`` read and ``future[depths + 1, count]`` after each."""
        count, at, end = len(tokens), place + self.lead * (document + 1), self.bounds[document + 1]
        tokens[1:] = self.data[at : at + count - 1]
        tokens[0] = self.start_token if place == self.first(document) else self.data[at - 1]
        for depth in range(len(future)):
            ahead = self.data[at + depth : min(at + depth + count, end)]
            future[depth, : len(ahead)] = ahead


@dataclass(frozen=True)
class Split:
    """One or several streams, blended by integer weights.

    ``baselines`` (validation only) are bits per byte over all its bytes: ``unigram``, ``zlib``, ``lzma``.
    """

    name: str
    streams: tuple[Stream, ...]
    weights: tuple[int, ...]
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Targets of all streams."""
        return sum(s.tokens for s in self.streams)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text of all streams; 0 if any is not known."""
        return 0 if any(s.bytes == 0 for s in self.streams) else sum(s.bytes for s in self.streams)

    @property
    def documents(self) -> int:
        """Documents of all streams."""
        return sum(s.documents for s in self.streams)

    def windows(
        self, seq_length: int, depths: int, count: int, *, part: int = 0, parts: int = 1, limit: int = 0
    ) -> Iterator[Batch]:
        """Every token of the split exactly once as a target, in order, ``count`` windows at a time.

        The last window of each stream is shorter; ``samples`` are window numbers. Of each ``count`` windows
        this gives one of ``parts`` shares, which may be empty. A ``limit`` takes so many windows, spread
        evenly over the split: a quick estimate.
        """
        starts = [0]
        for stream in self.streams:
            starts.append(starts[-1] + ceil(stream.tokens / seq_length))
        total = starts[-1]
        take = min(total, limit) if limit else total
        for head in range(0, take, count):
            own = share(min(count, take - head), parts, part)
            numbers = [(head + i) * total // take for i in own]
            windows = [self._window(n, starts, seq_length, depths) for n in numbers]
            yield join(windows) if windows else empty(depths + 1)

    def _window(self, number: int, starts: list[int], seq_length: int, depths: int) -> Batch:
        which = bisect_right(starts, number) - 1
        stream, place = self.streams[which], (number - starts[which]) * seq_length
        return stream.window(place, min(seq_length, stream.tokens - place), depths, number)


def make_split(name: str, streams: Sequence[Stream], weights: Sequence[float] = ()) -> Split:
    """A split with distinct keys and integer weights; no weights: each stream counts by its tokens."""
    seen: dict[str, int] = {}
    distinct = []
    for stream in streams:  # the same content listed twice is two sources, each with its own position
        again = seen[stream.key] = seen.get(stream.key, 0) + 1
        distinct.append(stream if again == 1 else replace(stream, key=f"{stream.key}#{again}"))
    shares = list(weights) or [float(s.tokens) for s in streams]
    whole = tuple(max(1, round(w / sum(shares) * 1_000_000_000)) for w in shares)
    return Split(name, tuple(distinct), whole)
