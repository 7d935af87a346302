"""What changes from one plan to another, and how many bytes each rank has to receive for it.

A rank receives what rests with it under the second plan and not under the first: weights, and the optimizer's
master copy and moments. Gradients do not outlive a step. Where the store cuts, bytes are exact for buffers
that hold a unit's parameters in the order of its specs and are cut evenly (``shard.share``); a store that
aligns buffers or joins units moves the ends of these cuts, which changes little.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import accumulate, product

from weft.plan.box import Box
from weft.plan.grid import Grid
from weft.plan.layout import Plan, of_experts
from weft.plan.shard import SHARD, Held, share
from weft.plan.units import Unit, units
from weft.spec.count import StateBytes, state_of
from weft.spec.hybrid import HybridConfig
from weft.spec.param import ParamSpec

Change = tuple[str, str, str]  # what, before, after
Boxes = Mapping[str, tuple[Box, ...]]  # by parameter


@dataclass(frozen=True)
class Moved:
    """Bytes received by ranks that go from one plan to another.

    Attributes:
        total: by all ranks.
        largest: by the rank that receives most.
        rank: the first such rank.
    """

    total: int
    largest: int
    rank: int


def diff(before: Plan, after: Plan) -> list[Change]:
    """Every axis, dimension and setting of the store that differs, in the words of the settings."""
    found: list[Change] = [("ranks", str(before.world), str(after.world))]
    old, new = before.dense, after.dense
    found.append(("decoder.ranks", _span(old.grid), _span(new.grid)))
    found += _axes("decoder", old.grid, new.grid)
    for name in SHARD:
        was, now = ("tp" if name in plane.shard else "none" for plane in (old.plane, new.plane))
        found.append((f"decoder.shard.{name}", was, now))
    for f in fields(old.store):
        was, now = (str(getattr(store, f.name)) for store in (old.store, new.store))
        found.append((f"decoder.store.{f.name}", was, now))
    for name in ("attend", "scan"):
        found.append((f"decoder.{name}", getattr(old, name), getattr(new, name)))
    found += _axes("experts", before.experts.grid, after.experts.grid)
    for name in ("transport", "node"):
        was, now = (str(getattr(plan.experts, name)) for plan in (before, after))
        found.append((f"experts.{name}", was, now))
    for f in fields(before.schedule):
        was, now = (str(getattr(plan.schedule, f.name)) for plan in (before, after))
        found.append((f"schedule.{f.name}", was, now))
    found += _cuts(before, after)
    return [change for change in found if change[1] != change[2]]


def _cuts(before: Plan, after: Plan) -> Iterator[Change]:
    """Layers of the stages, and tp where pipeline ranks differ in it."""
    old, new = ([str(len(piece.layers)) for piece in p.cut.pieces] if p.cut else [] for p in (before, after))
    if len(old) > 1 or len(new) > 1:
        yield "layers of the stages", " ".join(old), " ".join(new)
    was, now = (" ".join(str(p.dense.plane.tp) for p in each.of_stages) for each in (before, after))
    yield "decoder.tp_of_stages", was, now


def _axes(role: str, old: Grid, new: Grid) -> Iterator[Change]:
    for axis, size in old.axes:
        yield f"{role}.{axis}", str(size), str(new.size(axis))


def _span(grid: Grid) -> str:
    ranks = list(grid.ranks)
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    return ",".join(map(str, ranks if len(ranks) <= 8 else [*ranks[:7], "...", ranks[-1]]))


def moved(model: HybridConfig, precision: str, before: Plan, after: Plan) -> Moved:
    """Bytes that ranks receive on the way from ``before`` to ``after``; every rank has its old state."""
    old, new = _Side(model, precision, before), _Side(model, precision, after)
    each = [(_received(old, new, rank), rank) for rank in after.dense.grid.ranks]
    most, rank = max(each, key=lambda pair: (pair[0], -pair[1]))
    return Moved(sum(count for count, _ in each), most, rank)


@dataclass(frozen=True)
class _Buffer:
    """Parameters of one unit that are cut together, as one place of a plan holds them.

    Attributes:
        specs: the parameters.
        held: global and local boxes of each.
        shapes: of the local tensors.
        ends: where each ends in the buffer.
    """

    specs: tuple[ParamSpec, ...]
    held: tuple[tuple[Held, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]

    def cut(self, cuts: int, index: int) -> dict[str, tuple[Box, ...]]:
        """Global boxes of one of ``cuts`` runs of the buffer."""
        mine = share(self.ends[-1], cuts, index)
        found: dict[str, tuple[Box, ...]] = {}
        for i in range(bisect_right(self.ends, mine.start), len(self.ends)):
            begin = self.ends[i] - math.prod(self.shapes[i])
            if begin >= mine.stop:
                break
            local = flat_boxes(
                self.shapes[i], max(mine.start - begin, 0), min(mine.stop, self.ends[i]) - begin
            )
            found[self.specs[i].name] = tuple(_globally(local, self.held[i]))
        return found


class _Side:
    """What rests where under one plan; what ranks have in common is computed once."""

    def __init__(self, model: HybridConfig, precision: str, plan: Plan) -> None:
        self.plan, self.units = plan, units(model)
        self.bytes = [
            [(spec.name, each.weight, each.master + each.moments) for spec, each in _states(unit, precision)]
            for unit in self.units
        ]
        positions = range(plan.dense.grid.size("pp"))
        self._names = [
            [{name for name in unit.names if position in plan.positions(name)} for position in positions]
            for unit in self.units
        ]
        self._precision = precision
        self._buffers: dict[tuple[int, ...], list[_Buffer]] = {}

    def names(self, unit: int, rank: int) -> set[str]:
        """Units of a kind that a rank has."""
        return self._names[unit][self.plan.position(rank)] if rank in self.plan.dense.grid else set()

    def resting(self, unit: int, rank: int) -> tuple[Boxes, Boxes]:
        """Boxes that rest at a rank: weights, and the optimizer's state."""
        level = self.plan.dense.store.level
        weights, state = dict[str, tuple[Box, ...]](), dict[str, tuple[Box, ...]]()
        for buffer in self._of(unit, rank):
            cut = buffer.cut(*self.plan.of_rank(rank).rests(buffer.specs[0], rank))
            state |= cut
            weights |= cut if level >= 3 else buffer.cut(1, 0)
        return weights, state

    def _of(self, unit: int, rank: int) -> list[_Buffer]:
        plan = self.plan.of_rank(rank)
        key = unit, plan.dense.places, plan.dense.place(rank), plan.experts.place(rank)
        if key not in self._buffers:
            groups: dict[tuple[StateBytes, bool, bool], list[ParamSpec]] = {}
            for spec, each in _states(self.units[unit], self._precision):
                groups.setdefault((each, spec.decay, of_experts(spec)), []).append(spec)
            self._buffers[key] = [_buffer(plan, specs, rank) for specs in groups.values()]
        return self._buffers[key]


def _states(unit: Unit, precision: str) -> list[tuple[ParamSpec, StateBytes]]:
    return [(spec, state_of(spec, precision)) for spec in unit.specs]


def _buffer(plan: Plan, specs: list[ParamSpec], rank: int) -> _Buffer:
    shapes = tuple(plan.shape(spec, rank) for spec in specs)
    boxes = tuple(plan.held(spec, rank) for spec in specs)
    return _Buffer(tuple(specs), boxes, shapes, tuple(accumulate(map(math.prod, shapes))))


def _received(old: _Side, new: _Side, rank: int) -> int:
    total = 0
    for unit in range(len(new.units)):
        here = new.names(unit, rank)
        if not here:
            continue
        both = len(here & old.names(unit, rank))
        needs = new.resting(unit, rank)
        total += (len(here) - both) * _bytes(new.bytes[unit], needs, ({}, {}))
        total += both * _bytes(new.bytes[unit], needs, old.resting(unit, rank)) if both else 0
    return total


def _bytes(each: list[tuple[str, int, int]], needs: tuple[Boxes, Boxes], has: tuple[Boxes, Boxes]) -> int:
    return sum(
        size * _missing(wanted.get(name, ()), there.get(name, ()))
        for name, *sizes in each
        for size, wanted, there in zip(sizes, needs, has, strict=True)
    )


def _globally(local: Iterable[Box], held: Iterable[Held]) -> Iterator[Box]:
    for box, piece in product(local, held):
        common = box.overlap(piece.local)
        if common:
            moves = zip(common.start, piece.local.start, piece.box.start, strict=True)
            yield Box(tuple(at - here + there for at, here, there in moves), common.shape)


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Elements ``start`` to ``stop - 1`` of a tensor in row-major order: at most 2 n - 1 boxes of n axes."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    (first, before), (last, after) = divmod(start, row), divmod(stop, row)

    def inside(at: int, begin: int, end: int) -> list[Box]:
        boxes = flat_boxes(shape[1:], begin, end)
        return [Box((at, *box.start), (1, *box.shape)) for box in boxes]

    if first == last:
        return inside(first, before, after)
    head = inside(first, before, row) if before else []
    first += bool(before)
    middle = [Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if last > first else []
    return [*head, *middle, *inside(last, 0, after)]


def _missing(wanted: tuple[Box, ...], there: tuple[Box, ...]) -> int:
    """Elements of ``wanted`` outside ``there``; the boxes of each are disjoint."""
    common = (box.overlap(other) for box in wanted for other in there)
    return sum(box.numel for box in wanted) - sum(box.numel for box in common if box)
