"""Splits and loaders of documents that are never cut: windows of different lengths, with items."""

from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np

from weft.config.errors import DataError
from weft.data.batch import Batch, empty, join
from weft.data.documents import Documents, Found
from weft.data.packing import Windows, pack, shuffled
from weft.plan.items import Item, Placed
from weft.plan.runs import Run
from weft.plan.shard import share

_VERSION = "packed-1"
_EPOCHS = 2  # whose windows are kept


@dataclass(frozen=True)
class PackedSplit:
    """Documents of one or several sources, counted through.

    Attributes:
        name: of the split.
        sources: documents of each source.
        start_token: what the model reads before the first token of a document.
        swaps: items that are shown in place of others, by (document, number).
        baselines: what a model must beat, by name.
    """

    name: str
    sources: tuple[Documents, ...]
    start_token: int
    swaps: dict[tuple[int, int], Item] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    @property
    def documents(self) -> int:
        """Of all sources."""
        return sum(len(s) for s in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of all documents, placeholders included."""
        return sum(s.tokens for s in self.sources)

    @property
    def targets(self) -> int:
        """Next tokens that count in the loss."""
        return sum(s.targets for s in self.sources)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples left out, by reason."""
        found: defaultdict[str, int] = defaultdict(int)
        for source in self.sources:
            for reason, count in source.skipped.items():
                found[reason] += count
        return dict(found)

    @property
    def key(self) -> str:
        """Of the content of all sources, in order."""
        return "-".join(s.key for s in self.sources)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.concatenate([np.zeros(0, np.int32), *(s.lengths for s in self.sources)])

    def _at(self, document: int) -> tuple[Documents, int]:
        for source in self.sources:
            if document < len(source):
                return source, document
            document -= len(source)
        raise IndexError(document)

    def items(self, document: int) -> list[Found]:
        """Items of a document, and the stored tokens that they take."""
        source, number = self._at(document)
        found = source.items(number)
        return [Found(self.swaps.get((document, i), f.item), f.start) for i, f in enumerate(found)]

    def document(self, document: int, depths: int, sample: int = 0) -> Batch:
        """One document as a window of its own.

        A document of stored tokens ``t1 .. tn`` reads ``start t1 .. tn-1`` and predicts ``t1 .. tn``.
        """
        source, number = self._at(document)
        stored, counted = source.stored(number)
        size = len(stored)
        future = np.full((depths + 1, size), -1, np.int64)
        mask = np.zeros((depths + 1, size), bool)
        for depth in range(min(depths + 1, size)):
            future[depth, : size - depth] = stored[depth:]
            mask[depth, : size - depth] = counted[depth:]
        tokens = np.concatenate([[self.start_token], stored[:-1]])
        placed = tuple(Placed(f.item, (Run(f.start + 1, f.item.rows),)) for f in self.items(document))
        return Batch(tokens, future, mask, (size,), (sample,), (size,), placed)

    def window(self, documents: Iterable[int], depths: int, sample: int) -> Batch:
        """Some documents as one window."""
        made = join([self.document(document, depths) for document in documents])
        return replace(made, samples=(sample,), sizes=(len(made.tokens),))

    def packed(self, seq_length: int) -> Windows:
        """The documents of each window that ``windows`` gives, by the window's number.

        Raises:
            DataError: a document is longer than ``seq_length``.
        """
        return pack(self.lengths, np.arange(self.documents), seq_length)

    def windows(
        self, seq_length: int, depths: int, count: int, *, part: int = 0, parts: int = 1, limit: int = 0
    ) -> Iterator[Batch]:
        """Every document once, in order, ``count`` windows at a time; ``samples`` are window numbers.

        Of each ``count`` windows this gives one of ``parts`` shares, which may be empty. A ``limit`` takes so
        many windows, spread evenly over the split: a quick estimate.

        Raises:
            DataError: a document is longer than ``seq_length``.
        """
        plan = self.packed(seq_length)
        total = len(plan)
        take = min(total, limit) if limit else total
        for head in range(0, take, count):
            own = share(min(count, take - head), parts, part)
            numbers = [(head + i) * total // take for i in own]
            windows = [self.window(plan.window(n), depths, n) for n in numbers]
            yield join(windows) if windows else empty(depths + 1)

    def shuffled(self, seed: int = 0) -> "PackedSplit":
        """The same texts with items of equal encoder and sizes exchanged among all documents.

        Each gets that of another, wherever there are two; who sees nothing cannot tell the difference.
        """
        alike: defaultdict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
        items: dict[tuple[int, int], Item] = {}
        for document in range(self.documents):
            for number, (item, _) in enumerate(self.items(document)):
                items[document, number] = item
                alike[item.encoder, item.sizes, item.rows].append((document, number))
        swaps = {}
        for kind, places in alike.items():
            order = [places[i] for i in shuffled(len(places), seed, repr(kind), 0)]
            swaps |= {place: items[other] for place, other in zip(order, order[1:] + order[:1], strict=True)}
        return replace(self, swaps=swaps)


class PackedLoader:
    """Windows of a split by global sample number; knows no ranks, keeps no position.

    In each epoch the documents come in another order and are packed anew, which depends on the seed and the
    epoch alone; so the number of windows may differ from epoch to epoch.

    Args:
        split: the split to draw from.
        seq_length: most tokens of a window.
        depths: MTP depths; each batch has ``depths + 1`` rows of targets.
        seed: seed of the order.
        lookahead: documents among which one is chosen to fill a window.
        state: what ``state`` gave in an earlier run, to go on from there.

    ``changes`` says in words what differs from the data of ``state``.

    Raises:
        DataError: a document is longer than ``seq_length``, or there is none.
    """

    def __init__(
        self,
        split: PackedSplit,
        seq_length: int,
        depths: int,
        seed: int,
        lookahead: int = 256,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.split, self.seq_length, self.depths, self.seed = split, seq_length, depths, seed
        self.lookahead = lookahead
        self.changes: list[str] = []
        if not split.documents:
            raise DataError(f"the split {split.name!r} has no samples")
        self._lengths = split.lengths
        self._plans: OrderedDict[int, Windows] = OrderedDict()
        self._lock = Lock()
        self._first, self._starts = 0, [0]  # the first epoch known; where it and each after it begin
        if state is not None:
            self._resume(state)
        self.plan(self._first)

    def plan(self, epoch: int) -> Windows:
        """The windows of an epoch."""
        with self._lock:
            found = self._plans.get(epoch)
            if found is None:
                order = shuffled(len(self._lengths), self.seed, self.split.key, epoch)
                found = pack(self._lengths, order, self.seq_length, self.lookahead)
                self._plans[epoch] = found
                while len(self._plans) > _EPOCHS:
                    self._plans.popitem(last=False)
            return found

    def microbatch(self, start: int, count: int) -> Batch:
        """Samples ``start .. start + count - 1`` of the run."""
        windows = []
        for sample in range(start, start + count):
            epoch, first = self._epoch(sample)
            documents = self.plan(epoch).window(sample - first)
            windows.append(self.split.window(documents, self.depths, sample))
        return join(windows) if windows else empty(self.depths + 1)

    def state(self, samples: int) -> dict[str, Any]:
        """The position after ``samples`` samples of the run, as JSON."""
        epoch, first = self._epoch(samples)
        known = {"version": _VERSION, "samples": samples, "epoch": epoch, "first": first}
        return known | {"order": self._identity()}

    def _epoch(self, sample: int) -> tuple[int, int]:
        """The epoch of a sample, and the first sample of that epoch."""
        if sample < self._starts[0]:
            raise ValueError(f"sample {sample} lies before {self._starts[0]}, where this data began")
        while sample >= (last := self._starts[-1]):
            epoch = self._first + len(self._starts) - 1
            after = last + len(self.plan(epoch))
            if self._starts[-1] == last:
                self._starts.append(after)
        place = bisect_right(self._starts, sample) - 1
        return self._first + place, self._starts[place]

    def _identity(self) -> list[Any]:
        return [self.split.key, self.seq_length, self.seed, self.lookahead]

    def _resume(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION:
            self._starts = [state["samples"]]
            self.changes.append(f"{self.split.name}: other data before, starts at its beginning")
        elif state["order"] == self._identity():
            self._first, self._starts = state["epoch"], [state["first"]]
        else:
            self._first, self._starts = state["epoch"] + 1, [state["samples"]]
            self.changes.append(
                f"{self.split.name}: data, data.seq_length, data.lookahead or run.seed changed; goes on in "
                f"epoch {self._first}"
            )
