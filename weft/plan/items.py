"""What encoders read: items (an image, a clip) as sequences of rows, and which rows are computed together.

An item has sequences that an encoder computes apart from each other: an image or a clip of sound is one, a
video has one for each group of frames. A sequence of ``whole`` rows may be cut: a piece is some of its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from weft.plan.runs import Run

Size = tuple[int, ...]
"""Of a sequence. Picture: frames (1, or those of a group), rows and columns of patches; sound: mel frames."""


class Item(NamedTuple):
    """Something that an encoder turns into rows of the residual stream.

    Attributes:
        encoder: name of the encoder.
        sizes: of its sequences.
        rows: tokens that it takes in the decoder.
        ref: how the source finds it; plain values.
    """

    encoder: str
    sizes: tuple[Size, ...]
    rows: int
    ref: tuple[int | str | float, ...]


class Placed(NamedTuple):
    """An item and the tokens of a flat run that its rows take, in order."""

    item: Item
    places: tuple[Run, ...]


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a sequence of ``whole`` rows; ``sequence`` is its number in the pass."""

    sequence: int
    start: int
    stop: int
    whole: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class Pieces:
    """What the ranks that may share sequences compute in one pass of an encoder.

    Attributes:
        sizes: of every sequence of the pass.
        ranks: pieces of each of these ranks, in order; together every row of their sequences once.
        own: which of them is here.
    """

    sizes: tuple[Size, ...]
    ranks: tuple[tuple[Piece, ...], ...]
    own: int = 0

    @classmethod
    def all(cls, sizes: Sequence[Size], rows: Sequence[int]) -> "Pieces":
        """All sequences on one rank."""
        return cls(tuple(sizes), (tuple(Piece(i, 0, n, n) for i, n in enumerate(rows)),))

    @property
    def here(self) -> tuple[Piece, ...]:
        """Pieces of this rank."""
        return self.ranks[self.own]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each piece here."""
        return tuple(piece.rows for piece in self.here)

    @property
    def rows(self) -> int:
        """Rows here."""
        return sum(self.lengths)

    @property
    def shared(self) -> bool:
        """Whether some sequence is on several ranks; all of them agree on it."""
        return any(piece.rows < piece.whole for pieces in self.ranks for piece in pieces)

    def reach(self, rows: int | None) -> tuple[Piece, ...]:
        """The pieces here, each with so many more rows of its sequence on both sides; all of it if None."""
        return tuple(reach(piece, rows) for piece in self.here)

    def part(self, rows: range) -> tuple[Piece, ...]:
        """Of the rows here, counted through, some that follow one another, as pieces."""
        found: list[Piece] = []
        for piece, first in zip(self.here, accumulate(self.lengths, initial=0), strict=False):
            start, stop = max(rows.start, first), min(rows.stop, first + piece.rows)
            if start < stop:
                moved = piece.start - first
                found.append(piece._replace(start=start + moved, stop=stop + moved))
        return tuple(found)


def reach(piece: Piece, rows: int | None) -> Piece:
    """A piece with so many more rows on both sides, as far as its sequence goes; all of it if None."""
    if rows is None:
        return piece._replace(start=0, stop=piece.whole)
    return piece._replace(start=max(0, piece.start - rows), stop=min(piece.whole, piece.stop + rows))
