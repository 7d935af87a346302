"""The schedule that a plan's settings ask for: lists of a kind or from a file, completed and proved."""

from functools import lru_cache
from pathlib import Path

from weft.config.errors import ConfigError
from weft.plan.pipelines import SPLIT, compute, graph_of, parse_lists
from weft.plan.placing import complete
from weft.plan.prove import Proof, prove
from weft.plan.schedule import Lists, Schedule
from weft.plan.stages import Cut, cut
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import ScheduleConfig


@lru_cache(maxsize=8)
def _file(path: str) -> Lists:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; name a file of lists in plan.schedule.file"
        ) from None
    try:
        return parse_lists(text, path)
    except ConfigError as error:
        raise ValueError("; ".join(map(str, error.problems))) from None


def homes(config: ScheduleConfig, ranks: int) -> tuple[int, ...]:
    """Pipeline rank of each stage, for so many pipeline ranks.

    Raises:
        ValueError: a file that cannot be used, or is for another number of ranks.
    """
    if config.kind != "file":
        return tuple(compute(config.kind, ranks, config.stages, 1)[0].home.values())
    lists = _file(config.file)
    if len(lists) != ranks:
        found = f"{config.file} has the lists of {len(lists)} pipeline ranks, but pp is {ranks}"
        raise ValueError(f"{found}; set plan.decoder.pp to {len(lists)}")
    return tuple(graph_of(lists).home.values())


def uncut(model: HybridConfig, config: ScheduleConfig) -> Cut:
    """The stages of a model that all lie on one pipeline rank."""
    return cut(model, homes(config, 1), config.layers)


@lru_cache(maxsize=16)
def schedule_of(config: ScheduleConfig, stages: Cut, microbatches: int, level: int) -> tuple[Schedule, Proof]:
    """The schedule of a step and what is known of it; it may have faults.

    Args:
        config: what the user set.
        stages: of the model.
        microbatches: of a step.
        level: of the store.

    Raises:
        ValueError: a file that cannot be used.
    """
    if config.kind == "file":
        graph, lists = stages.graph, _file(config.file)
    else:
        ranks = 1 + max(stages.home)
        graph, lists = compute(config.kind, ranks, config.stages, microbatches, stages.cost)
    gather = config.gather if level >= 2 else "unit"
    split = config.kind in SPLIT
    done = complete(graph, lists, level=level, gather=gather, resident=config.resident, split=split)
    return done, prove(done, config.most_live)
