"""On which pipeline rank each stage of a decoder lies: by the kind of pipeline, or by a file of lists."""

from functools import lru_cache
from pathlib import Path

from weft.config.errors import ConfigError
from weft.plan.pipelines import compute, graph_of, parse_lists
from weft.plan.schedule import Lists
from weft.plan.stages import Cut, cut
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import ScheduleConfig


@lru_cache(maxsize=8)
def lists_of(path: str) -> Lists:
    """The lists of a file.

    Raises:
        ValueError: it cannot be used.
    """
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
        return tuple(seat for (seat,) in compute(config.kind, ranks, config.stages, 1)[0].home.values())
    graph = graph_of(lists_of(config.file))
    if graph.seats != ranks:
        found = f"{config.file} has the lists of {graph.seats} pipeline ranks, but pp is {ranks}"
        raise ValueError(f"{found}; set plan.decoder.pp to {graph.seats}")
    return tuple(seat for (seat,) in graph.home.values())


def uncut(model: HybridConfig, config: ScheduleConfig) -> Cut:
    """The stages of a model that all lie on one pipeline rank."""
    return cut(model, homes(config, 1), config.layers)
