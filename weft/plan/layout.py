"""A plan with its grids: what settings mean on a given number of ranks."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from weft.config.errors import ConfigError, Problem
from weft.plan.grid import Grid, divisors, parse_ranks
from weft.plan.homes import homes
from weft.plan.shard import SHARD, Held, Plane, expert_boxes, held, share
from weft.plan.stages import CONTEXT, Cut, cut, even, run_of
from weft.spec.count import mean_context
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import (
    Attend,
    ExpertsConfig,
    LayoutConfig,
    PlanConfig,
    Scan,
    ScheduleConfig,
    StoreConfig,
    Transport,
)
from weft.spec.param import ParamSpec
from weft.spec.run import RunConfig, TrainConfig


@dataclass(frozen=True)
class Layout:
    """One role's grid and what is cut over it.

    Attributes:
        grid: the ranks. The last two axes are those of a place; the others but pp, copies of it.
        store: how parameters rest.
        over: axes of the copies over which the store cuts, outer to inner.
    """

    grid: Grid
    store: StoreConfig
    over: tuple[str, ...]

    @property
    def inner(self) -> tuple[str, ...]:
        """Axes of a place: tp and tp_embed, or ep and etp."""
        return tuple(name for name, _ in self.grid.axes[-2:])

    @property
    def places(self) -> int:
        """Ranks that hold one copy of everything in a stage."""
        return self.grid.size(*self.inner)

    def place(self, rank: int) -> int:
        """Number of a rank's place among those of one copy."""
        return self.grid.index(rank, *self.inner)

    @property
    def firsts(self) -> Sequence[int]:
        """The first rank of each pipeline rank."""
        return self.grid.ranks[:: len(self.grid.ranks) // self.grid.size("pp")]

    def holders(self, positions: Iterable[int], places: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks of pipeline ranks whose place is one of ``places``: all copies of a box."""
        size, length = self.places, len(self.grid.ranks) // self.grid.size("pp")
        return tuple(
            rank
            for position in positions
            for i, rank in enumerate(self.grid.ranks[position * length : (position + 1) * length])
            if i % size in places
        )

    @property
    def cuts(self) -> int:
        """Into how many parts the store cuts what a rank holds."""
        return (self.store.shards or self.grid.size(*self.over)) if self.store.level else 1

    def store_group(self, rank: int) -> tuple[int, ...]:
        """Ranks over which the store cuts what ``rank`` holds, in the order of the cuts."""
        everyone = self.grid.group(rank, *self.over)
        first = everyone.index(rank) // self.cuts * self.cuts
        return everyone[first : first + self.cuts]


@dataclass(frozen=True)
class Dense(Layout):
    """Layout of everything but the routed experts.

    Attributes:
        plane: the ranks that share one copy of a layer, and what is cut over them.
        attend: form of attention where ranks share tokens.
        scan: form of scans there.
    """

    plane: Plane
    attend: Attend = "auto"
    scan: Scan = "auto"

    @property
    def readers(self) -> int:
        """Ranks (or groups of them) that read different samples."""
        return self.grid.size("dp")

    def tokens(self, count: int) -> tuple[int, ...]:
        """Tokens of each of the ranks that share a run of ``count``."""
        parts = self.grid.size("cp")
        return tuple(len(share(count, parts, index)) for index in range(parts))


@dataclass(frozen=True)
class Experts(Layout):
    """Layout of the routed experts, over the ranks and stages of the rest.

    Attributes:
        transport: how tokens travel.
        node: ranks of a node.
    """

    transport: Transport = "auto"
    node: int = 8


@dataclass(frozen=True)
class Plan:
    """Layouts by role on ``world`` ranks.

    Attributes:
        world: number of ranks.
        dense: of everything but the routed experts.
        experts: of these.
        cut: stages of the model and the pipeline ranks that have them; None without a model.
        of_stages: the plan of each pipeline rank where they differ in tp; it holds for its ranks only.
        schedule: order of a step.
    """

    world: int
    dense: Dense
    experts: Experts
    schedule: ScheduleConfig
    cut: Cut | None = None
    of_stages: tuple["Plan", ...] = ()

    def at(self, position: int) -> "Plan":
        """The plan of a pipeline rank."""
        return self.of_stages[position] if self.of_stages else self

    def of_rank(self, rank: int) -> "Plan":
        """The plan of a rank's pipeline rank."""
        return self.at(self.position(rank))

    @property
    def level(self) -> int:
        """Of the store; 0 where nobody shares a copy of what it holds."""
        plans = (self, *self.of_stages)
        return self.dense.store.level if any(max(p.dense.cuts, p.experts.cuts) > 1 for p in plans) else 0

    def position(self, rank: int) -> int:
        """Pipeline rank of a rank."""
        return self.dense.grid.index(rank, "pp")

    @property
    def readers(self) -> int:
        """Ranks (or groups of them) that read different samples, where they are fewest."""
        return min(plan.dense.readers for plan in (self, *self.of_stages))

    def together(self, train: TrainConfig) -> int:
        """Sequences that all readers compute at the same time, at most."""
        return min(train.micro_batch_size * self.readers, train.global_batch_size)

    def microbatches(self, train: TrainConfig) -> int:
        """Parts into which the global batch is cut, each computed by all readers at the same time."""
        return -(-train.global_batch_size // self.together(train))

    def positions(self, name: str) -> tuple[int, ...]:
        """Pipeline ranks that hold a unit, or the unit of a parameter.

        Raises:
            ValueError: there are several, and no model said how it is cut.
        """
        if self.cut is not None:
            return self.cut.ranks_of(name)
        if self.dense.grid.size("pp") > 1:
            raise ValueError("which pipeline rank has a unit depends on the model: make the plan with it")
        return (0,)

    def has(self, rank: int, name: str) -> bool:
        """Whether a rank has (its part of) a unit, or of the unit of a parameter."""
        return self.position(rank) in self.positions(name)

    def of(self, spec: ParamSpec) -> Layout:
        """The layout of a parameter."""
        return self.experts if of_experts(spec) else self.dense

    def held(self, spec: ParamSpec, rank: int) -> tuple[Held, ...]:
        """Boxes of a parameter of this rank's stage that the rank computes with; holders are places.

        Raises:
            ValueError: a dimension that the plan cannot cut.
        """
        place = self.of(spec).place(rank)
        if of_experts(spec):
            return expert_boxes(spec.dims, self.experts.grid.size("ep"), self.experts.grid.size("etp"), place)
        return held(spec, self.dense.plane, place)

    def shape(self, spec: ParamSpec, rank: int) -> tuple[int, ...]:
        """Shape of this rank's tensor of a parameter of its stage."""
        boxes = self.held(spec, rank)
        return tuple(max(box.local.stop[axis] for box in boxes) for axis in range(len(spec.dims)))

    def rests(self, spec: ParamSpec, rank: int) -> tuple[int, int]:
        """Into how many parts the store cuts what ``rank`` holds of a parameter, and which is the rank's."""
        layout = self.of(spec)
        return (1, 0) if spec.buffer else (layout.cuts, layout.grid.index(rank, *layout.over) % layout.cuts)

    def room(self, spec: ParamSpec) -> int:
        """Elements of the largest tensor that any place has of a parameter."""
        places = [self.of(spec).grid.ranks[place] for place in range(self.of(spec).places)]
        return max(math.prod(self.shape(spec, rank)) for rank in places)


def of_experts(spec: ParamSpec) -> bool:
    """Whether a parameter is laid out on the grid of the experts."""
    return any(part.axis == "expert_mlp" for dim in spec.dims for part in dim)


def plan_of(
    config: PlanConfig, world: int, model: HybridConfig | None = None, context: float = CONTEXT
) -> Plan:
    """The plan on ``world`` ranks.

    Args:
        config: what the user set.
        world: ranks of the run.
        model: what is cut into stages; without it only grids are known.
        context: mean keys that a token sees, for the cost of stages.

    Raises:
        ConfigError: sizes that do not fill the ranks, every problem at once.
    """
    problems: list[Problem] = []
    each = _of_stages(config, problems)
    plans = [plan for other in each if (plan := _grids(other, world, problems))]
    cut = _cut(config, model, context, problems) if model and not problems else None
    if problems:
        raise ConfigError(problem.under("plan") for problem in dict.fromkeys(problems))
    plans = [replace(plan, cut=cut) for plan in plans]
    return replace(plans[0], of_stages=tuple(plans) if len(plans) > 1 else ())


def plan_of_encoder(config: LayoutConfig, world: int, layers: int) -> Plan:
    """The plan of an encoder with so many layers, cut evenly into stages, one for each pipeline rank.

    Raises:
        ConfigError: sizes that do not fill the ranks, or that encoders do not have; every problem at once.
    """
    problems = list(_not_of_encoders(config))
    if config.pp > layers:
        problems.append(Problem("pp", f"{config.pp} pipeline ranks, but the encoder has {layers} layers"))
    plan = _grids(PlanConfig(decoder=config), world, found := list[Problem]())
    problems += [Problem(problem.path.removeprefix("decoder."), problem.message) for problem in found]
    if problems or plan is None:
        raise ConfigError(problems)
    counts = even([1.0] * layers, [0.0] * config.pp)
    return replace(plan, cut=run_of(counts, tuple(range(config.pp))))


def _not_of_encoders(config: LayoutConfig) -> Iterator[Problem]:
    """What only a decoder's layout may say."""
    for name, usual in (("tp_embed", 1), ("tp_of_stages", ()), ("attend", "auto"), ("scan", "auto")):
        if (value := getattr(config, name)) != usual:
            yield Problem(name, f"{value}, but only the decoder has this; remove it")


def plan_of_run(run: RunConfig, world: int) -> Plan:
    """The plan of a run; errors as ``plan_of``."""
    return plan_of(run.plan, world, run.model, mean_context((run.data.seq_length,)))


def _grids(config: PlanConfig, world: int, problems: list[Problem]) -> Plan | None:
    dense = _dense(config.decoder, world, problems)
    experts = _experts(config.experts, dense, problems) if dense else None
    return Plan(world, dense, experts, config.schedule) if dense and experts else None


def _of_stages(config: PlanConfig, problems: list[Problem]) -> list[PlanConfig]:
    """The plan of each pipeline rank, or one for all of them."""
    decoder, sizes = config.decoder, config.decoder.tp_of_stages
    if not sizes:
        return [config]
    if len(sizes) != decoder.pp or min(sizes) < 1 or decoder.dp or decoder.tp not in (1, sizes[0]):
        message = (
            f"{list(sizes)} is the tp of each pipeline rank: name {decoder.pp} numbers from 1 on, and leave "
            "tp and dp to follow from them"
        )
        problems.append(Problem("decoder.tp_of_stages", message))
        return []
    return [replace(config, decoder=replace(decoder, tp=tp, tp_of_stages=())) for tp in sizes]


def _cut(config: PlanConfig, model: HybridConfig, context: float, problems: list[Problem]) -> Cut | None:
    schedule, layers = config.schedule, len(model.parts.main)
    try:
        home = homes(schedule, config.decoder.pp)
        if len(home) <= layers or schedule.layers:
            return cut(model, home, schedule.layers, context)
        several = len(home) > config.decoder.pp
        most = layers // config.decoder.pp if several else layers
        message = f"{len(home)} stages, but model.pattern has {layers} layers; set {most} or less"
        problems.append(Problem("schedule.virtual" if several and most else "decoder.pp", message))
    except ConfigError as error:
        problems += error.problems
    except ValueError as error:
        path = "file" if schedule.kind == "file" else "layers"
        problems.append(Problem(f"schedule.{path}", str(error)))
    return None


def _dense(config: LayoutConfig, world: int, problems: list[Problem]) -> Dense | None:
    found = [problem.under("decoder") for problem in _wrong(config, world)]
    problems += found
    if found:
        return None
    ranks = parse_ranks(config.ranks, world)
    fixed = config.pp * config.cp * config.tp * config.tp_embed
    sizes = (config.pp, config.dp or len(ranks) // fixed, config.cp, config.tp, config.tp_embed)
    grid = Grid(ranks, tuple(zip(("pp", "dp", "cp", "tp", "tp_embed"), sizes, strict=True)))
    table = {**SHARD, **config.shard}
    shard = frozenset(name for name, axis in table.items() if axis == "tp")
    over = tuple(axis for axis in ("dp", "cp") if axis in config.store.over)
    plane = Plane(config.tp, config.tp_embed, shard)
    return Dense(grid, config.store, over, plane, config.attend, config.scan)


def _wrong(config: LayoutConfig, world: int) -> Iterator[Problem]:
    for name, axis in config.shard.items():
        yield from (problem.under(f"shard.{name}") for problem in _wrong_axis(name, axis))
    try:
        count = len(parse_ranks(config.ranks, world))
    except ValueError as error:
        yield Problem("ranks", str(error))
        return
    sizes = {axis: int(getattr(config, axis)) for axis in ("pp", "cp", "tp", "tp_embed")}
    fixed = math.prod(sizes.values())
    words = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    product = f"{words} = {fixed}" if " x " in words else words
    if config.dp and config.dp * fixed != count:
        whole = f"{config.dp} x ({product})" if fixed > 1 else "dp"
        fix = f"set dp to {count // fixed}, or to 0, which fills the ranks" if count % fixed == 0 else ""
        fix = fix or f"choose sizes whose product is {count}"
        yield Problem("dp", f"{whole} is {config.dp * fixed}, but there are {count} ranks; {fix}")
    elif count % fixed:
        largest = max(sizes, key=lambda axis: sizes[axis])
        fix = f"choose sizes whose product divides {count}, or start {-(-count // fixed) * fixed} ranks"
        yield Problem(largest, f"{product} does not divide the {count} ranks; {fix}")
    else:
        yield from _wrong_store(config, config.dp or count // fixed)


def _wrong_axis(name: str, axis: str) -> Iterator[Problem]:
    if name not in SHARD:
        fix = "tp_embed cuts embed" if name == "embed" else f"tp can cut {', '.join(SHARD)}"
        yield Problem("", f"{name!r} is not a dimension that a table cuts; {fix}")
    elif axis not in ("tp", "none"):
        yield Problem("", f"{axis!r} cannot cut a dimension; use tp or none")


def _wrong_store(config: LayoutConfig, dp: int) -> Iterator[Problem]:
    store, sizes = config.store, {"dp": dp, "cp": config.cp}
    over = math.prod(sizes[axis] for axis in store.over)
    if store.shards and over % store.shards:
        fitting = ", ".join(map(str, divisors(over)))
        axes = " x ".join(store.over)
        yield Problem(
            "store.shards",
            f"{store.shards} does not divide {axes} = {over}; it can be {fitting}, or 0 for all",
        )


def _experts(config: ExpertsConfig, dense: Dense, problems: list[Problem]) -> Experts | None:
    pp = dense.grid.size("pp")
    stage = len(dense.grid.ranks) // pp
    inner = config.ep * config.etp
    if stage % inner:
        fitting = ", ".join(map(str, divisors(stage)))
        message = (
            f"ep {config.ep} x etp {config.etp} = {inner} does not divide the {stage} ranks of a stage; "
            f"the product can be {fitting}"
        )
        problems.append(Problem("experts.ep", message))
        return None
    axes = (("pp", pp), ("edp", stage // inner), ("ep", config.ep), ("etp", config.etp))
    grid = Grid(dense.grid.ranks, axes)
    return Experts(grid, replace(dense.store, shards=0), ("edp",), config.transport, config.node)
