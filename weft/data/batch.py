"""What the loader hands to training: a flat run of tokens with its targets and boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jaxtyping import Bool, Int64

from weft.plan.items import Placed
from weft.plan.runs import Run


@dataclass(frozen=True)
class Batch:
    """Packed windows, flat over tokens.

    ``future[k - 1, i]`` is the token ``k`` places after token ``i`` in the same document, and -1 where the
    document has none. The loader looks beyond the window, never beyond the document. ``lengths`` are the
    segments (a document, or its part inside one window) and sum to the tokens; ``samples`` are the global
    indices of the windows, and ``sizes`` their tokens, where they are not all alike. ``mask`` tells which
    targets count: all that exist, except in the last window of an epoch, whose repeated tokens do not count
    twice, and where the data says that it does not (the question of a conversation). ``items`` are what
    encoders read, and the tokens whose places their rows take, in order.
    """

    tokens: Int64[np.ndarray, " tokens"]
    future: Int64[np.ndarray, "targets tokens"]
    mask: Bool[np.ndarray, "targets tokens"]
    lengths: tuple[int, ...]
    samples: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    items: tuple[Placed, ...] = ()

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        count = len(self.samples)
        return self.sizes or (len(self.tokens) // max(1, count),) * count

    @property
    def targets(self) -> tuple[int, ...]:
        """Targets that count, per depth: next token first, then the MTP depths."""
        return tuple(int(n) for n in self.mask.sum(axis=1))


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all windows, in order."""
    firsts = accumulate((len(b.tokens) for b in batches), initial=0)
    return Batch(
        tokens=np.concatenate([b.tokens for b in batches]),
        future=np.concatenate([b.future for b in batches], axis=1),
        mask=np.concatenate([b.mask for b in batches], axis=1),
        lengths=tuple(n for b in batches for n in b.lengths),
        samples=tuple(n for b in batches for n in b.samples),
        sizes=tuple(n for b in batches for n in b.windows),
        items=tuple(_moved(p, first) for b, first in zip(batches, firsts, strict=False) for p in b.items),
    )


def _moved(placed: Placed, by: int) -> Placed:
    """The same item, ``by`` tokens further on."""
    return Placed(placed.item, tuple(Run(run.start + by, run.length) for run in placed.places))


def empty(targets: int) -> Batch:
    """A batch of no samples with ``targets`` rows of targets: the share of a reader that has nothing left."""
    none = np.zeros((targets, 0), dtype=np.int64)
    return Batch(none[0], none, none.astype(bool), lengths=(), samples=())
