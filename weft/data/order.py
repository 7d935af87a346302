"""Which tokens global sample ``g`` holds: a pure function of the seed and ``g``.

Three steps, none stored, all O(1) in the size of the corpus:

1. The *schedule* says which source sample ``g`` belongs to and how many it gave before: sample ``j`` of a
   source of weight ``w`` is due at time ``(j + 1/2) / w`` and the samples are taken as they fall due
   (Webster's rule: the source that lags most behind its share comes next).
2. In each epoch the source's stream is cut at a random phase into windows, the stream closed to a ring;
   a keyed Feistel permutation (Luby and Rackoff 1988; cycle walking: Black and Rogaway 2002) orders them.
3. The ring is covered exactly once an epoch: of the last window only the tokens not yet seen count.
"""

import heapq
from collections.abc import Iterator
from fractions import Fraction
from hashlib import blake2b
from itertools import islice
from math import ceil
from typing import Any

from weft.config.errors import DataError
from weft.data.batch import Batch, empty, join
from weft.data.stream import Split, Stream

_ROUNDS = 4
_VERSION = 1


def permute(index: int, size: int, key: bytes) -> int:
    """Where a keyed random permutation of ``range(size)`` sends ``index``.

    A Feistel network over the smallest even number of bits that hold ``size``, walked until the value falls
    inside (at most 4 times on average).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            word = blake2b(right.to_bytes(8, "little") + bytes([turn]), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(word, "little") & low)
        index = left << half | right
        if index < size:
            return index


class Schedule:
    """The source of each sample of a blend, for positive integer weights."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self.weights = weights

    def counts(self, sample: int) -> list[int]:
        """Samples each source has given before ``sample``."""
        return self._seek(sample)[0]

    def walk(self, sample: int) -> Iterator[tuple[int, int]]:
        """(source, its own sample number) from ``sample`` on, without end."""
        counts, due = self._seek(sample)
        while True:
            source = self._next(counts, due)
            yield source, counts[source] - 1

    def _seek(self, sample: int) -> tuple[list[int], list[tuple[Fraction, int]]]:
        # What is due before time (sample - S) / W is surely among the first `sample`; the rest is walked.
        total = sum(self.weights)
        before = sample - len(self.weights)
        counts = [max(0, (2 * before * w + total - 1) // (2 * total)) for w in self.weights]
        due = [(Fraction(2 * n + 1, w), s) for s, (n, w) in enumerate(zip(counts, self.weights, strict=True))]
        heapq.heapify(due)
        for _ in range(sample - sum(counts)):
            self._next(counts, due)
        return counts, due

    def _next(self, counts: list[int], due: list[tuple[Fraction, int]]) -> int:
        source = due[0][1]
        counts[source] += 1
        heapq.heapreplace(due, (Fraction(2 * counts[source] + 1, self.weights[source]), source))
        return source


class Loader:
    """Batches of a split by global sample index; knows no ranks, keeps no position.

    Args:
        blend: the split to draw from.
        seq_length: tokens per window.
        depths: MTP depths; each batch has ``depths + 1`` rows of targets.
        seed: seed of the order.
        state: what ``state`` gave in an earlier run, to go on from there, also with another blend: sources
            kept continue where they were, new ones start at 0, removed ones are remembered.

    ``changes`` says in words what differs from the blend of ``state``.
    """

    def __init__(
        self, blend: Split, seq_length: int, depths: int, seed: int, state: dict[str, Any] | None = None
    ) -> None:
        self.blend, self.seq_length, self.depths, self.seed = blend, seq_length, depths, seed
        self.changes: list[str] = []
        self._schedule = Schedule(blend.weights)
        self._origin, self._base = 0, [0] * len(blend.streams)
        self._retired: dict[str, dict[str, Any]] = {}
        if state is not None:
            self._resume(state)

    def microbatch(self, start: int, count: int) -> Batch:
        """Samples ``start .. start + count - 1`` of the run."""
        if not count:
            return empty(self.depths + 1)
        windows = []
        walk = islice(self._schedule.walk(self._since(start)), count)
        for sample, (source, index) in enumerate(walk, start):
            windows.append(self._window(self.blend.streams[source], self._base[source] + index, sample))
        return join(windows)

    def state(self, samples: int) -> dict[str, Any]:
        """The position after ``samples`` samples of the run, as JSON."""
        counts = self._schedule.counts(self._since(samples))
        sources = dict(self._retired)
        for stream, base, count in zip(self.blend.streams, self._base, counts, strict=True):
            sources[stream.key] = {"name": stream.name, "consumed": base + count, **self._ordering(stream)}
        return {
            "version": _VERSION,
            "samples": samples,
            "origin": self._origin,
            "base": list(self._base),
            "blend": self._identity(),
            "sources": sources,
        }

    def _since(self, sample: int) -> int:
        if sample < self._origin:
            raise ValueError(f"sample {sample} lies before {self._origin}, where this blend began")
        return sample - self._origin

    def _window(self, stream: Stream, index: int, sample: int) -> Batch:
        epoch, turn = divmod(index, self._windows(stream))
        key = blake2b(f"{self.seed}/{stream.key}/{epoch}".encode(), digest_size=32).digest()
        place = permute(turn, self._windows(stream), key) * self.seq_length
        phase = int.from_bytes(blake2b(b"phase", key=key, digest_size=8).digest(), "little") % stream.tokens
        batch = stream.window((phase + place) % stream.tokens, self.seq_length, self.depths, sample)
        fresh = stream.tokens - place
        if fresh < self.seq_length:
            batch.mask[:, fresh:] = False
        return batch

    def _windows(self, stream: Stream) -> int:
        return ceil(stream.tokens / self.seq_length)

    def _ordering(self, stream: Stream) -> dict[str, int]:
        return {"windows": self._windows(stream), "seq_length": self.seq_length, "seed": self.seed}

    def _identity(self) -> list[list[Any]]:
        pairs = zip(self.blend.streams, self.blend.weights, strict=True)
        return [[s.key, w, self.seq_length, self.seed] for s, w in pairs]

    def _resume(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise DataError(f"data position of version {state.get('version')}, but {_VERSION} is read")
        known, here = state["sources"], {stream.key for stream in self.blend.streams}
        self._retired = {key: old for key, old in known.items() if key not in here}
        if state["blend"] == self._identity():
            self._origin, self._base = state["origin"], list(state["base"])
            return
        self._origin = state["samples"]
        self._base = [self._continue(stream, known.get(stream.key)) for stream in self.blend.streams]
        for key in sorted({key for key, *_ in state["blend"]} & set(self._retired)):
            old = self._retired[key]
            self.changes.append(f"{old['name']}: left the blend; its position, {old['consumed']}, is kept")

    def _continue(self, stream: Stream, old: dict[str, Any] | None) -> int:
        if old is None:
            self.changes.append(f"{stream.name}: new in the blend, starts at its beginning")
            return 0
        consumed, ordering = old["consumed"], self._ordering(stream)
        if {k: old[k] for k in ordering} == ordering:
            self.changes.append(f"{stream.name}: goes on at its sample {consumed}")
            return consumed
        epoch = ceil(consumed / old["windows"])
        self.changes.append(f"{stream.name}: data.seq_length or run.seed changed; goes on in epoch {epoch}")
        return epoch * ordering["windows"]
