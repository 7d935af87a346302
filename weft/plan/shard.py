"""Who holds what: sharding by the names of dimensions.

Tensor parallelism has a *plane* of ``tp x tp_embed`` ranks; place ``(t, e)`` has the number
``t * tp_embed + e``. What a dimension is made of says how it is cut (``Plane.kind``):

- ``embed``   the residual width: cut over tp_embed, tokens over tp;
- ``inner``   heads, kv_heads, groups, mlp, vocab: cut over all places; tokens whole;
- ``plain``   everything else (latent, experts, state): whole; tokens over all places.

A parameter with an ``embed`` and an ``inner`` dimension has the first cut over tp_embed and the second over
tp, each rank holding the inner items of all places of its row. A token table keeps ``embed`` whole.
``kv_heads`` and ``groups`` that are fewer than the places are shared by neighbouring places, which is exact
because the gradient of a parameter is the sum over all ranks that hold it (docs/design.md, law 1).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import Any, Literal, TypeVar, cast

from weft.config.base import Config
from weft.plan.box import Box
from weft.spec.param import Dim, ParamSpec, Part, size

Kind = Literal["embed", "inner", "plain"]
C = TypeVar("C", bound=Config)

SHARD: dict[str, str] = dict.fromkeys(("heads", "kv_heads", "groups", "mlp", "vocab"), "tp")
SHARED = frozenset({"kv_heads", "groups"})  # may be fewer than the places; every other count divides
UNEVEN = frozenset({"vocab"})  # cut as evenly as it goes


def share(count: int, parts: int, index: int) -> range:
    """The ``index``-th of ``parts`` runs of ``range(count)`` that differ by at most one, longest first."""
    base, more = divmod(count, parts)
    start = index * base + min(index, more)
    return range(start, start + base + (index < more))


@dataclass(frozen=True)
class Plane:
    """The ranks that share one copy of a layer.

    Attributes:
        tp: ranks that share inner dimensions.
        tp_embed: ranks that share the residual width.
        shard: names cut over the plane (those that are mapped to ``tp``).
    """

    tp: int = 1
    tp_embed: int = 1
    shard: frozenset[str] = frozenset(SHARD)

    @property
    def size(self) -> int:
        """Ranks of the plane."""
        return self.tp * self.tp_embed

    def kind(self, dim: Dim) -> Kind:
        """How activations of this dimension are cut."""
        if any(part.axis in self.shard for part in dim):
            return "inner"
        return "embed" if any(part.axis == "embed" for part in dim) else "plain"

    def items(self, part: Part, place: int) -> range:
        """Items of a part that activations at a place have.

        Raises:
            ValueError: the part cannot be cut like that; the message names both numbers.
        """
        if part.axis == "embed":
            return _even(part, self.tp_embed, place % self.tp_embed)
        if part.axis not in self.shard:
            return range(part.count)
        if part.axis in UNEVEN:
            return share(part.count, self.size, place)
        if part.axis in SHARED and self.size % part.count == 0:
            item = place // (self.size // part.count)
            return range(item, item + 1)
        return _even(part, self.size, place)

    def rows(self, tokens: int, place: int) -> range:
        """Tokens of a place where features are not cut over tp_embed (``plain``)."""
        row = self.residual_rows(tokens, place)
        inside = share(len(row), self.tp_embed, place % self.tp_embed)
        return row[inside.start : inside.stop]

    def residual_rows(self, tokens: int, place: int) -> range:
        """Tokens of a place in the residual stream."""
        return share(tokens, self.tp, place // self.tp_embed)


def _even(part: Part, parts: int, index: int) -> range:
    if part.count % parts:
        shared = f" (nor {part.count} {parts})" if part.axis in SHARED else ""
        raise ValueError(f"{parts} ranks do not divide {part.axis} = {part.count}{shared}")
    return share(part.count, parts, index)


@dataclass(frozen=True)
class Held:
    """A box of a parameter at one place.

    Attributes:
        box: in the global tensor.
        local: in the tensor of this place.
        holders: places that hold this very box, ascending.
    """

    box: Box
    local: Box
    holders: tuple[int, ...]


Run = tuple[int, int]  # first row and number of rows


@dataclass(frozen=True)
class _Cutter:
    """Runs of the dimensions of one parameter."""

    dims: tuple[Dim, ...]
    plane: Plane

    @cached_property
    def cut_embed(self) -> int | None:
        """The dimension that tp_embed cuts: the last ``embed``, in what is not a token table."""
        names = [{part.axis for part in dim} for dim in self.dims]
        if any("vocab" in found for found in names) and "vocab" in self.plane.shard:
            return None
        return max((i for i, found in enumerate(names) if "embed" in found), default=None)

    def run(self, axis: int, part: Part, place: int) -> Run:
        """Rows of one part of a dimension that a place holds."""
        items = range(part.count)
        if part.axis == "embed":
            items = self.plane.items(part, place) if axis == self.cut_embed else items
        elif part.axis in self.plane.shard:
            first = last = place
            if self.cut_embed is not None:  # the items of all places of this row
                first = place - place % self.plane.tp_embed
                last = first + self.plane.tp_embed - 1
            items = range(self.plane.items(part, first).start, self.plane.items(part, last).stop)
        return items.start * part.width, len(items) * part.width

    def held(self, place: int) -> Iterator[tuple[Box, Box]]:
        """Global and local boxes, in the order of the local tensor."""
        axes = [list(self._runs(axis, dim, place)) for axis, dim in enumerate(self.dims)]
        for runs in product(*axes):
            lengths = tuple(length for _, _, length in runs)
            yield Box(tuple(r[0] for r in runs), lengths), Box(tuple(r[1] for r in runs), lengths)

    def _runs(self, axis: int, dim: Dim, place: int) -> Iterator[tuple[int, int, int]]:
        """(global start, local start, rows) of each part; parts that follow one another are one run."""
        origin = at = 0
        open_run: tuple[int, int, int] | None = None
        for part in dim:
            start, length = self.run(axis, part, place)
            start += origin
            origin += part.size
            if open_run and open_run[0] + open_run[2] == start and self._alike(axis, dim):
                open_run = (open_run[0], open_run[1], open_run[2] + length)
            else:
                if open_run:
                    yield open_run
                open_run = (start, at, length)
            at += length
        if open_run:
            yield open_run

    def _alike(self, axis: int, dim: Dim) -> bool:
        """Whether all parts are held whole, so that they may be one run."""
        return all(self.run(axis, part, p)[1] == part.size for part in dim for p in range(self.plane.size))


@lru_cache(maxsize=4096)
def _plane_boxes(dims: tuple[Dim, ...], plane: Plane) -> tuple[tuple[Held, ...], ...]:
    cutter = _Cutter(dims, plane)
    boxes = [list(cutter.held(place)) for place in range(plane.size)]
    holders: dict[Box, list[int]] = {}
    for place, found in enumerate(boxes):
        for box, _ in found:
            holders.setdefault(box, []).append(place)
    _refuse_overlaps(holders, plane)
    if sum(box.numel for box in holders) < math.prod(map(size, dims)):
        names = " and ".join(
            "+".join(part.axis for part in dim) for dim in dims if plane.kind(dim) == "inner"
        )
        raise ValueError(
            f"a parameter with the dimensions {names} would be cut along both over {plane.size} ranks; name "
            "one of them by a dimension that is not sharded"
        )
    return tuple(tuple(Held(box, local, tuple(holders[box])) for box, local in found) for found in boxes)


def _refuse_overlaps(holders: Mapping[Box, list[int]], plane: Plane) -> None:
    distinct = sorted((box for box in holders if box.numel), key=lambda box: box.start)
    for i, box in enumerate(distinct):
        for other in distinct[i + 1 :]:
            if other.start[0] >= box.stop[0]:
                break
            if box.overlap(other):
                raise ValueError(
                    f"tp_embed = {plane.tp_embed} cuts through key/value heads or groups that neighbours "
                    f"share (tp = {plane.tp}); choose sizes of which one divides the other"
                )


def held(spec: ParamSpec, plane: Plane, place: int) -> tuple[Held, ...]:
    """What a place holds of a parameter, in the order of its local tensor.

    Raises:
        ValueError: a dimension that the plane cannot cut; the message names both numbers.
    """
    return _plane_boxes(spec.dims, plane)[place]


@lru_cache(maxsize=4096)
def expert_boxes(dims: tuple[Dim, ...], ep: int, etp: int, place: int) -> tuple[Held, ...]:
    """What one of ``ep * etp`` places holds of a stacked parameter of experts.

    Raises:
        ValueError: ranks that do not divide the experts or their inner width.
    """
    cuts = {"experts": (ep, place // etp), "expert_mlp": (etp, place % etp)}
    runs: list[range] = []
    for dim in dims:
        (part,) = dim
        parts, index = cuts.get(part.axis, (1, 0))
        runs.append(_even(part, parts, index))
    box = Box(tuple(run.start for run in runs), tuple(len(run) for run in runs))
    return (Held(box, Box.whole(box.shape), (place,)),)


def features(dim: Dim, plane: Plane, place: int) -> tuple[tuple[int, ...], ...]:
    """Columns that each place of a row takes from a product's output.

    The output has the columns that ``place``'s row of the plane holds together: all of an ``embed``
    dimension, the union of the inner items of the row's places. Entry ``e`` lists those of place ``(t, e)``,
    in the order of its activations; shared heads and groups appear in several.
    """
    first = place - place % plane.tp_embed
    places = range(first, first + plane.tp_embed)
    lists: list[list[int]] = [[] for _ in places]
    at = 0
    for part in dim:
        taken = [plane.items(part, p) for p in places]
        start, stop = min(run.start for run in taken), max(run.stop for run in taken)
        for columns, run in zip(lists, taken, strict=True):
            begin = at + (run.start - start) * part.width
            columns.extend(range(begin, begin + len(run) * part.width))
        at += (stop - start) * part.width
    return tuple(map(tuple, lists))


def localize(config: C, plane: Plane, place: int) -> C:
    """The layer that one place computes: the same config with local counts.

    Cuts every ``Part`` by its axis and every field that declares the dimension it counts
    (``setting(..., dim="heads")``). Numbers that the mathematics needs whole (a norm's group, the experts of
    a router) declare none and stay.
    """
    changes: dict[str, Any] = {}
    for f in fields(config):
        value: Any = getattr(config, f.name)
        axis = f.metadata.get("dim")
        if axis and value:
            changes[f.name] = len(plane.items(Part(axis, value), place))
        else:
            changes[f.name] = _localized(value, plane, place)
    return replace(config, **changes)


def _localized(value: Any, plane: Plane, place: int) -> Any:
    if isinstance(value, Part):
        return replace(value, count=len(plane.items(value, place)))
    if isinstance(value, Config):
        return localize(value, plane, place)
    if isinstance(value, tuple):
        return tuple(_localized(item, plane, place) for item in cast(tuple[Any, ...], value))
    return value
