"""Boxes of a global tensor, and the little interval algebra that layouts and checkpoints need."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """The elements ``start[i] <= index[i] < start[i] + shape[i]`` of a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index of each axis."""
        return tuple(start + size for start, size in zip(self.start, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether this is a box of a tensor of this shape."""
        return (
            len(self.start) == len(self.shape) == len(shape)
            and min((*self.start, *self.shape, 0)) >= 0
            and all(stop <= size for stop, size in zip(self.stop, shape, strict=True))
        )

    def overlap(self, other: "Box") -> "Box | None":
        """The common box; None where there is none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        shape = tuple(last - first for first, last in zip(start, stop, strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that holds ``outer``."""
        moved = (first - origin for first, origin in zip(self.start, outer.start, strict=True))
        return tuple(slice(first, first + size) for first, size in zip(moved, self.shape, strict=True))


def tiles(shape: tuple[int, ...], boxes: Iterable[Box]) -> bool:
    """Whether the boxes (each inside ``shape``) hold every element exactly once."""
    full = sorted((box for box in boxes if box.numel), key=lambda box: box.start)
    if sum(box.numel for box in full) != math.prod(shape):
        return False
    active: list[Box] = []  # boxes that may still meet a later one; few where tensors are cut by rows
    for box in full:
        active = [other for other in active if other.stop[:1] > box.start[:1]]
        if any(other.overlap(box) for other in active):
            return False
        active.append(box)
    return True
