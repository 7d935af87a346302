"""A plan with its grids: what settings mean on a given number of ranks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from weft.config.errors import ConfigError, Problem
from weft.plan.grid import Grid
from weft.plan.shard import SHARD, Plane
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, StoreConfig


@dataclass(frozen=True)
class Layout:
    """One role's grid and what is cut over it."""

    grid: Grid
    plane: Plane
    store: StoreConfig

    def place(self, rank: int) -> int:
        """Number of a rank's place on the tensor plane."""
        return self.grid.index(rank, "tp", "tp_embed")

    def holders(self, rank: int, places: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks of this rank's stage whose place is one of ``places``: all copies of a box."""
        copies = self.grid.group(rank, "dp", "cp", "tp", "tp_embed")
        size = self.plane.size
        return tuple(other for i, other in enumerate(copies) if i % size in places)

    def store_group(self, rank: int) -> tuple[int, ...]:
        """Ranks over which the store cuts what ``rank`` holds, in the order of the cuts."""
        everyone = self.grid.group(rank, *self.store.over)
        if self.store.level == 0:
            return (rank,)
        shards = self.store.shards or len(everyone)
        first = everyone.index(rank) // shards * shards
        return everyone[first : first + shards]

    @property
    def readers(self) -> int:
        """Ranks (or groups of them) that read different samples."""
        return self.grid.size("dp")


@dataclass(frozen=True)
class Plan:
    """Layouts by role on ``world`` ranks; ``experts`` is a second grid over the decoder's ranks."""

    world: int
    decoder: Layout
    experts: Grid


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


def plan_of(config: PlanConfig, world: int) -> Plan:
    """The plan on ``world`` ranks.

    Raises:
        ConfigError: sizes that do not fill the ranks, every problem at once.
    """
    problems: list[Problem] = []
    decoder = _decoder(config.decoder, world, problems)
    experts = _experts(config.experts, decoder, problems) if decoder else None
    if decoder is None or experts is None:
        raise ConfigError(problem.under("plan") for problem in problems)
    return Plan(world, decoder, experts)


def _decoder(config: LayoutConfig, world: int, problems: list[Problem]) -> Layout | None:
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
    return Layout(grid, Plane(config.tp, config.tp_embed, shard), config.store)


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


def divisors(count: int) -> list[int]:
    """Numbers that divide ``count``, ascending."""
    return [n for n in range(1, count + 1) if count % n == 0]


def _experts(config: ExpertsConfig, decoder: Layout, problems: list[Problem]) -> Grid | None:
    pp = decoder.grid.size("pp")
    stage = len(decoder.grid.ranks) // pp
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
    return Grid(decoder.grid.ranks, axes)
