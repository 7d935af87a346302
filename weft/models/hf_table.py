"""Key tables: how published checkpoints name and cut the tensors of a family.

A table is literal: one row per kind of tensor, with our name, their names and the operation between them. A
family expands its tables over a model's layers into links; a link is read in both directions. Every
operation so far moves boxes without touching a value, so bytes survive any round trip.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from weft.spec.param import ParamSpec

Op = Literal["same", "rows", "stack", "tap"]


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        ours: our name, below a prefix.
        theirs: published names, below their prefix; ``{}`` is the index of a stack.
        op: ``same``: equal shapes; ``rows``: one published tensor per part of our first dimension;
            ``stack``: one per index of our first dimension; ``tap``: ``[C, K]`` here is ``[C, 1, K]`` there.
    """

    ours: str
    theirs: tuple[str, ...]
    op: Op = "same"


@dataclass(frozen=True)
class Link:
    """The published tensor ``theirs`` is the box (``start``, ``size``) of our tensor ``ours``.

    Attributes:
        ours: our global name.
        theirs: published name.
        shape: shape of the published tensor; as many elements as the box, in the same order.
        start: first index of the box.
        size: shape of the box.
        copy: the published tensor repeats one that another link holds (a tied head).
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    copy: bool = False


@dataclass(frozen=True)
class Place:
    """A table, and the prefixes under which one layer has it on either side."""

    ours: str
    theirs: str
    rows: tuple[Row, ...]


def links(places: Iterable[Place], specs: Iterable[ParamSpec]) -> tuple[Link, ...]:
    """One link per published tensor, in the order of ``specs``; a row without a tensor gives none.

    Raises:
        LookupError: a tensor of ``specs`` that no row names.
    """
    rows = {place.ours + row.ours: (place.theirs, row) for place in places for row in place.rows}
    return tuple(link for spec in specs for link in _link(spec, *rows[spec.name]))


def _link(spec: ParamSpec, prefix: str, row: Row) -> Iterator[Link]:
    names = [prefix + name for name in row.theirs]
    whole = Link(spec.name, names[0], spec.shape, (0,) * len(spec.shape), spec.shape)
    match row.op:
        case "same":
            yield whole
        case "tap":
            yield replace(whole, shape=(spec.shape[0], 1, *spec.shape[1:]))
        case "rows":
            first = 0
            for name, part in zip(names, spec.dims[0], strict=True):
                size = (part.size, *spec.shape[1:])
                yield Link(spec.name, name, size, (first, *whole.start[1:]), size)
                first += part.size
        case "stack":
            inner = spec.shape[1:]
            for index in range(spec.shape[0]):
                start = (index, *whole.start[1:])
                yield Link(spec.name, names[0].format(index), inner, start, (1, *inner))
