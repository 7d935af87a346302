"""The schedule that a plan's settings ask for: lists of a kind or from a file, completed and proved."""

from collections.abc import Callable
from functools import lru_cache

from weft.plan.homes import lists_of, uncut
from weft.plan.pipelines import SPLIT, compute
from weft.plan.placing import complete, forward_only
from weft.plan.plans import Plans, module_of, stage_of
from weft.plan.prove import Proof, prove
from weft.plan.schedule import COMPUTE, Action, Cost, Graph, Lists, Schedule
from weft.plan.stages import Cut
from weft.plan.weave import Loom, Tower, weave
from weft.spec.layout import ScheduleConfig
from weft.spec.modules import DECODER, Modules

MEDIA = 0.5  # share of the decoder's tokens that encoders fill, where the data is not known yet
ROWS = 1024  # of a sequence of an encoder, likewise


@lru_cache(maxsize=16)
def schedule_of(config: ScheduleConfig, stages: Cut, microbatches: int, level: int) -> tuple[Schedule, Proof]:
    """The schedule of a step of a decoder alone and what is known of it; it may have faults.

    Args:
        config: what the user set.
        stages: of the model.
        microbatches: of a step.
        level: of the store.

    Raises:
        ValueError: a file that cannot be used.
    """
    graph, lists = _decoder_lists(config, stages, microbatches)
    return _completed(config, graph, lists, level)


def _decoder_lists(config: ScheduleConfig, stages: Cut, microbatches: int) -> tuple[Graph, Lists]:
    """What each pipeline rank of the decoder computes."""
    if config.kind == "file":
        return stages.graph, lists_of(config.file)
    ranks = 1 + max(stages.home)
    return compute(config.kind, ranks, config.stages, microbatches, stages.cost)


def _completed(
    config: ScheduleConfig, graph: Graph, lists: Lists, level: int, cost: Cost = lambda _: 1.0
) -> tuple[Schedule, Proof]:
    gather = config.gather if level >= 2 else "unit"
    split, resident = config.kind in SPLIT, config.resident
    done = complete(graph, lists, level=level, gather=gather, resident=resident, split=split, cost=cost)
    return done, prove(done, config.most_live)


def step_of(
    plans: Plans, modules: Modules, config: ScheduleConfig, microbatches: int
) -> tuple[Schedule, Proof]:
    """The schedule of a step of all modules, one list for each seat, and what is known of it.

    Raises:
        ValueError: a file that cannot be used, or fewer encoder groups in flight than the lists need.
    """
    stages = plans.decoder.cut or uncut(modules.decoder, config)
    level = max(plan.level for plan in plans.all.values())
    if not modules.encoders:
        return schedule_of(config, stages, microbatches, level)
    loom = loom_of(plans, modules, config)
    _, lists = _decoder_lists(config, stages, microbatches)
    ahead = config.encoder_groups_in_flight
    costs = cost_of(plans, modules, config, stages)
    graph, lists = weave(loom, lists, config.encoder_order, ahead, microbatches, costs)
    return _completed(config, graph, lists, level, costs)


def evaluation_of(plans: Plans, modules: Modules, config: ScheduleConfig) -> Schedule:
    """Forward passes of one round of microbatches, as many as there are seats at least."""
    loom = loom_of(plans, modules, config)
    return forward_only(loom.graph, loom.graph.seats)


def loom_of(plans: Plans, modules: Modules, config: ScheduleConfig) -> Loom:
    """Stages of all modules on the seats of a plan."""
    stages = plans.decoder.cut or uncut(modules.decoder, config)
    ranks = range(1 + max(stages.home))
    joined = (str(i) for i, home in enumerate(stages.home) if plans.joined(DECODER, home))
    return Loom(
        stages.graph,
        tuple(plans.seats_of(DECODER, rank) for rank in ranks),
        tuple(_tower(plans, modules, name, max(1, config.encoder_group)) for name in modules.encoders),
        frozenset(joined),
    )


def _tower(plans: Plans, modules: Modules, name: str, every: int) -> Tower:
    positions = range(plans.all[name].dense.grid.size("pp"))
    names = tuple(stage_of(name, position) for position in positions)
    joined = (stage for position, stage in enumerate(names) if plans.joined(name, position))
    seats = tuple(plans.seats_of(name, position) for position in positions)
    return Tower(name, names, seats, every, modules.all[name].frozen, frozenset(joined))


def cost_of(plans: Plans, modules: Modules, config: ScheduleConfig, stages: Cut) -> Callable[[Action], float]:
    """FLOPs of a pass on one rank, for each token of a microbatch of one reader of the decoder.

    What encoders read is not known before the data is: half of the tokens are taken to be theirs, in
    sequences of ROWS rows.
    """
    decoder, every = plans.decoder.dense.grid, max(1, config.encoder_group)
    shares: dict[str, float] = {}
    for name, encoder in modules.encoders.items():
        grid = plans.all[name].dense.grid
        row = encoder.flops(ROWS) / ROWS * encoder.grain * MEDIA
        ranks = len(grid.ranks) / (len(decoder.ranks) / decoder.size("pp"))
        shares[name] = row * every / ranks

    def cost(action: Action) -> float:
        name, _ = module_of(action.unit) if action.unit else (DECODER, 0)
        return shares[name] if name in shares and action.op in COMPUTE else stages.cost(action)

    return cost
