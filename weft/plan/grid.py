"""Grid: named axes over an ordered set of ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

AXES = ("pp", "dp", "cp", "tp", "tp_embed")
EXPERT_AXES = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True)
class Grid:
    """``ranks[i]`` stands at the i-th place of the axes, counted with the last axis fastest.

    Attributes:
        ranks: world ranks, in the order of the grid.
        axes: name and size of every axis, outer to inner, in the order of AXES or EXPERT_AXES.
    """

    ranks: Sequence[int]
    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if math.prod(size for _, size in self.axes) != len(self.ranks):
            raise ValueError(f"axes {dict(self.axes)} do not fill {len(self.ranks)} ranks")

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of each axis."""
        return dict(self.axes)

    @cached_property
    def _places(self) -> Mapping[int, int]:
        return {rank: place for place, rank in enumerate(self.ranks)}

    @cached_property
    def _strides(self) -> Mapping[str, int]:
        strides: dict[str, int] = {}
        stride = 1
        for name, size in reversed(self.axes):
            strides[name] = stride
            stride *= size
        return strides

    def size(self, *axes: str) -> int:
        """Ranks along these axes together; an axis that the grid does not have counts as 1."""
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    def __contains__(self, rank: int) -> bool:
        return rank in self._places

    def coordinates(self, rank: int) -> dict[str, int]:
        """Place of a rank on each axis.

        Raises:
            KeyError: a rank outside the grid.
        """
        place = self._places[rank]
        return {name: place // self._strides[name] % size for name, size in self.axes}

    def index(self, rank: int, *axes: str) -> int:
        """Place of a rank along several axes together, the first one outermost."""
        at, index = self.coordinates(rank), 0
        for axis in axes:
            index = index * self.size(axis) + at.get(axis, 0)
        return index

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` in nothing but these axes, the first axis outermost."""
        at = self.coordinates(rank)
        here = [axis for axis in axes if axis in self.sizes]
        base = self._places[rank] - sum(at[axis] * self._strides[axis] for axis in here)
        moves = product(*(range(self.sizes[axis]) for axis in here))
        return tuple(
            self.ranks[base + sum(i * self._strides[axis] for i, axis in zip(move, here, strict=True))]
            for move in moves
        )

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups along these axes, by their first rank's place."""
        starts = (rank for rank in self.ranks if all(self.coordinates(rank).get(a, 0) == 0 for a in axes))
        return [self.group(rank, *axes) for rank in starts]


def parse_ranks(text: str, world: int) -> tuple[int, ...]:
    """``all``, ``0-7`` or ``0-3,8-11`` as ranks.

    Raises:
        ValueError: not of that form, or ranks named twice or beyond the world.
    """
    if text == "all":
        return tuple(range(world))
    ranks: list[int] = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{text!r} is not of the form all, 0-7 or 0-3,8-11")
        start, stop = int(first), int(last or first) + 1
        if stop > world:
            raise ValueError(
                f"{text!r} names rank {stop - 1}, but there are {world} ranks (0 to {world - 1}); "
                "name fewer or start more"
            )
        ranks.extend(range(start, stop))
    if not ranks or len(set(ranks)) < len(ranks):
        raise ValueError(f"{text!r} names no rank, or one twice; name each once, the lower end first")
    return tuple(ranks)


def divisors(count: int) -> list[int]:
    """Numbers that divide ``count``, ascending."""
    return [n for n in range(1, count + 1) if count % n == 0]
