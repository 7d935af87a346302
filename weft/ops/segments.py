"""Document boundaries of a flat run of tokens."""

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Lengths, in tokens, of the documents that follow one another in a flat run.

    Lengths are host integers (the loader knows them), so that no kernel waits for the device.
    Index tensors are made once per device and kept.
    """

    lengths: tuple[int, ...]
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

    def ids(self, device: torch.device) -> Int[Tensor, " tokens"]:
        """Segment number of each token."""
        return self._keep("ids", device, self._make_ids)

    def _make_ids(self) -> Tensor:
        return torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))

    def _keep(self, name: str, device: torch.device, make) -> Tensor:  # noqa: ANN001
        key = (name, device)
        if key not in self._kept:
            self._kept[key] = make().to(device, non_blocking=True)
        return self._kept[key]
