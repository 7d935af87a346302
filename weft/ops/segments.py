"""Document boundaries of a flat run of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths, in tokens, of the documents that follow one another in a flat run.

    Lengths are host integers (the loader knows them), so that no kernel waits for the device.
    Index tensors are made once per device and kept.

    Attributes:
        lengths: of the documents, or of the parts of them that are here.
        windows: tokens of each sample of the whole run; empty where each document is one.
        cut: which part of a longer run this is, where ranks share one (context parallelism).
    """

    lengths: tuple[int, ...]
    windows: tuple[int, ...] = ()
    cut: "Cut | None" = None
    _kept: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens in all segments."""
        return sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @property
    def uniform(self) -> int:
        """The common length, or 0 when lengths differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else 0

    @property
    def whole(self) -> "Segments":
        """The documents of the whole run."""
        return self.cut.whole if self.cut else self

    @property
    def start(self) -> int:
        """First token of the whole run that is here."""
        return self.cut.start if self.cut else 0

    @cached_property
    def continues(self) -> bool:
        """Whether the first document here began before the first token here."""
        return bool(self.lengths) and self.start not in self.whole.starts

    def part(self, counts: Sequence[int], index: int) -> "Segments":
        """The ``index``-th of consecutive parts with so many tokens; documents without tokens in it go.

        Raises:
            ValueError: ``counts`` do not add up to the tokens here.
        """
        if sum(counts) != self.tokens:
            raise ValueError(f"parts of {list(counts)} tokens do not make a run of {self.tokens}")
        cut = Cut(self, tuple(counts), index)
        here = cut.ranges[index]
        ends = list(accumulate(self.lengths, initial=0))
        inside = (min(stop, here.stop) - max(start, here.start) for start, stop in pairwise(ends))
        return Segments(tuple(length for length in inside if length > 0), self.windows, cut)

    def ids(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Segment number of each token."""
        return self._keep("ids", device, self._make_ids)

    def _make_ids(self) -> Tensor:
        return torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    def _keep(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        key = (name, device)
        if key not in self._kept:
            self._kept[key] = make().to(device, non_blocking=True)
        return self._kept[key]


@dataclass(frozen=True)
class Cut:
    """Which part of a longer run is here.

    Attributes:
        whole: documents of the run.
        counts: tokens of each part, in order; some may be 0.
        index: the part that is here.
    """

    whole: Segments
    counts: tuple[int, ...]
    index: int

    @cached_property
    def ranges(self) -> tuple[range, ...]:
        """Tokens of the whole run in each part."""
        return tuple(range(a, b) for a, b in pairwise(accumulate(self.counts, initial=0)))

    @property
    def start(self) -> int:
        """First token here."""
        return self.ranges[self.index].start

    @cached_property
    def crosses(self) -> bool:
        """Whether a document has tokens in two parts; all parts agree on it."""
        edges = {part.start for part in self.ranges if part.start not in (0, self.whole.tokens)}
        return not edges <= set(self.whole.starts)
