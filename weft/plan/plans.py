"""The plans of all modules of a run, and seats: ranks that have the same stages, and so one list of actions.

Stages of the decoder are called ``0``, ``1``, ...; those of an encoder ``vision_0``, ``vision_1``, ...
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from weft.config.errors import ConfigError, Problem
from weft.plan.layout import Layout, Plan, plan_of, plan_of_encoder
from weft.plan.stages import CONTEXT
from weft.spec.count import mean_context
from weft.spec.layout import LayoutConfig, PlanConfig
from weft.spec.modules import DECODER, Modules
from weft.spec.run import RunConfig


def stage_of(module: str, stage: int) -> str:
    """The name of a stage of a module."""
    return str(stage) if module == DECODER else f"{module}_{stage}"


def module_of(stage: str) -> tuple[str, int]:
    """The module of a stage, and which of its stages it is."""
    name, _, number = stage.rpartition("_")
    return name or DECODER, int(number)


@dataclass(frozen=True)
class Plans:
    """Plans by module.

    Attributes:
        world: ranks of the run.
        all: of each module; encoders, then the decoder.
        everyone: whether the decoder's passes hold sums over all of its readers (some balance losses).
    """

    world: int
    all: Mapping[str, Plan]
    everyone: bool = False

    @property
    def decoder(self) -> Plan:
        """The decoder's."""
        return self.all[DECODER]

    @property
    def encoders(self) -> Mapping[str, Plan]:
        """Those of the encoders."""
        return {name: plan for name, plan in self.all.items() if name != DECODER}

    def of_rank(self, rank: int) -> dict[str, Plan]:
        """Of the modules that a rank has a part of."""
        return {name: plan for name, plan in self.all.items() if rank in plan.dense.grid}

    @cached_property
    def _of_rank(self) -> Mapping[int, tuple[tuple[str, int], ...]]:
        """Modules and pipeline ranks of every rank, the decoder's first."""
        order = [DECODER, *self.encoders]
        return {
            rank: tuple(
                (name, self.all[name].position(rank)) for name in order if rank in self.all[name].dense.grid
            )
            for rank in range(self.world)
        }

    @cached_property
    def seats(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that have the same stages; those of the decoder's first pipeline rank come first."""
        found: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for rank, parts in self._of_rank.items():
            found.setdefault(parts, []).append(rank)
        last = self.decoder.dense.grid.size("pp")

        def order(parts: tuple[tuple[str, int], ...]) -> tuple[int, int]:
            return dict(parts).get(DECODER, last), found[parts][0]

        return tuple(tuple(found[parts]) for parts in sorted(found, key=order))

    @cached_property
    def _seat(self) -> Mapping[int, int]:
        return {rank: seat for seat, ranks in enumerate(self.seats) for rank in ranks}

    def seat(self, rank: int) -> int:
        """The seat of a rank."""
        return self._seat[rank]

    def seats_of(self, module: str, position: int) -> tuple[int, ...]:
        """Seats that have a pipeline rank of a module, ascending."""
        have = (module, position)
        return tuple(seat for seat, ranks in enumerate(self.seats) if have in self._of_rank[ranks[0]])

    def joined(self, module: str, position: int) -> bool:
        """Whether passes of a pipeline rank of a module hold collectives between ranks of several seats."""
        if len(self.seats_of(module, position)) == 1:
            return False
        plan = self.all[module].at(position)
        level = plan.dense.store.level
        wide = ("dp",) if self.everyone and module == DECODER else ()
        axes = [(*wide, "cp", "tp", "tp_embed"), *([plan.dense.over] if level >= 2 else [])]
        groups = list(self._groups(plan.dense, position, axes))
        axes = [("ep", "etp"), *([plan.experts.over] if level >= 2 else [])]
        groups += self._groups(plan.experts, position, axes)
        return any(len({self._seat[rank] for rank in group}) > 1 for group in groups)

    @staticmethod
    def _groups(layout: Layout, position: int, axes: Iterable[tuple[str, ...]]) -> Iterable[tuple[int, ...]]:
        size = len(layout.grid.ranks) // layout.grid.size("pp")
        here = layout.grid.ranks[position * size : (position + 1) * size]
        return (layout.grid.group(rank, *names) for names in axes for rank in here)


def plans_of(config: PlanConfig, world: int, modules: Modules, context: float = CONTEXT) -> Plans:
    """The plans of all modules on ``world`` ranks; an encoder without a layout is on all, one copy each.

    Raises:
        ConfigError: sizes that do not fill the ranks, every problem at once.
    """
    problems: list[Problem] = []
    found: dict[str, Plan] = {}
    for name, encoder in modules.encoders.items():
        layout = config.encoders.get(name, LayoutConfig())
        try:
            found[name] = plan_of_encoder(layout, world, encoder.num_hidden_layers)
        except ConfigError as error:
            problems += [problem.under(f"plan.{name}") for problem in error.problems]
    try:
        found[DECODER] = plan_of(config, world, modules.decoder, context)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    model = modules.decoder
    return Plans(world, found, bool(model.router_batch_aux_loss_coef or model.router_global_aux_loss_coef))


def plans_of_run(run: RunConfig, world: int) -> Plans:
    """The plans of a run; errors as ``plans_of``."""
    return plans_of(run.plan, world, run.modules, mean_context((run.data.seq_length,)))
