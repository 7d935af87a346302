"""Settings of a plan: for each role of the model, a grid of ranks and who holds what on it.

Only what users write. ``weft.plan`` turns it into grids and boxes and checks it against a model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from weft.config.base import Config, setting
from weft.config.errors import Problem

StoreAxis = Literal["dp", "cp"]
Attend = Literal["auto", "ring", "all_gather", "all_to_all"]
Scan = Literal["auto", "states", "all_to_all"]
Transport = Literal["auto", "all_gather", "all_to_all", "per_rank", "per_node"]


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Config):
    """How parameters, gradients and optimizer state rest between uses (ZeRO, arXiv 1910.02054)."""

    level: Literal[0, 1, 2, 3] = setting(
        0, "cut over ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too"
    )
    over: tuple[StoreAxis, ...] = setting(("dp",), "axes of the grid over which to cut")
    shards: int = setting(
        0, "ranks that share one copy, a divisor of the size of `over` (hybrid); 0 is all", ge=0
    )
    prefetch: int = setting(1, "units gathered ahead of their use at level 3", ge=0)

    def check(self) -> Iterator[Problem]:
        """Axes named once."""
        if not self.over or len(set(self.over)) < len(self.over):
            yield Problem("over", f"{list(self.over)} must name at least one axis, each once")


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(Config):
    """One role's grid, axes from outer to inner: pp, dp, cp, tp, tp_embed.

    ``cp`` cuts a run of tokens into consecutive parts. ``tp`` cuts the inner dimensions (heads, mlp,
    vocabulary) and, between layers, the tokens of such a part. ``tp_embed``
    cuts the residual width too, which makes tensor parallelism three-dimensional (rows, columns and, with
    ``store`` at level 3, depth; AxoNN, arXiv 2502.08145).
    """

    ranks: str = setting("all", "ranks of the grid: 'all', '0-7' or '0-3,8-11'")
    pp: int = setting(1, "pipeline ranks, each with its own stages of the model", ge=1)
    dp: int = setting(0, "copies that read different samples; 0 fills the ranks", ge=0)
    cp: int = setting(1, "ranks that share the tokens of one sample", ge=1)
    tp: int = setting(1, "ranks that share inner dimensions", ge=1)
    tp_embed: int = setting(1, "ranks that share the residual width (3-D tensor parallelism)", ge=1)
    tp_of_stages: tuple[int, ...] = setting((), "tp of each pipeline rank, where not all have the same")
    shard: dict[str, str] = setting(dict, "dimension: axis; over heads, kv_heads, groups, mlp, vocab: tp")
    attend: Attend = setting("auto", "how ranks that share tokens attend; auto: fewest bytes")
    scan: Scan = setting("auto", "how ranks that share tokens scan; auto: fewest bytes")
    store: StoreConfig = setting(StoreConfig, "how parameters rest")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Config):
    """Grid of the routed experts over the decoder's ranks and stages: pp, edp, ep, etp."""

    ep: int = setting(1, "ranks that share the experts", ge=1)
    etp: int = setting(1, "ranks that share the inner width of each expert", ge=1)
    transport: Transport = setting("auto", "how tokens travel to experts; auto: fewest bytes")
    node: int = setting(8, "ranks of a node, between which links are slow", ge=1)


Kind = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "file"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """What each pipeline rank does in a step, and in which order."""

    kind: Kind = setting("1f1b", "order of forward and backward passes; file: as written in `file`")
    virtual: int = setting(0, "stages of each pipeline rank; 0: 2 if interleaved or zbv, else 1", ge=0)
    layers: tuple[int, ...] = setting((), "main layers of each stage; empty: stages of even cost")
    file: str = setting("", "lists of actions, one line for each pipeline rank")
    gather: Literal["unit", "stage"] = setting(
        "unit", "what is made whole at a time at store level 3: a unit inside its pass, or all of a stage"
    )
    resident: int = setting(
        0, "activations of passes kept on the device, the rest on the host; 0 is all", ge=0
    )
    most_live: int = setting(0, "refuse lists that keep more activations of passes; 0 is no limit", ge=0)
    encoder_order: Literal["lead", "first", "bubble"] = setting(
        "lead", "when encoders run: just before the decoder, before all of it, or where a rank would be idle"
    )
    encoder_group: int = setting(1, "microbatches that an encoder takes at a time", ge=1)
    encoder_groups_in_flight: int = setting(
        0, "groups between forward and backward pass of an encoder; 0: as few as will do", ge=0
    )
    trace: bool = setting(True, "write the executed and the simulated timeline of the last step")

    def check(self) -> Iterator[Problem]:
        """A file where it is asked for, and numbers of stages that the kind has."""
        if (self.kind == "file") != bool(self.file):
            fix = "name one" if self.kind == "file" else "set plan.schedule.kind=file, or remove it"
            yield Problem("file", f"{self.file!r} with kind {self.kind}; {fix}")
        if self.virtual and self.kind in ("gpipe", "1f1b") and self.virtual > 1:
            yield Problem(
                "virtual", f"{self.virtual} stages of a rank, but {self.kind} has 1; use interleaved"
            )
        if self.virtual not in (0, 2) and self.kind == "zbv":
            yield Problem("virtual", f"{self.virtual} stages of a rank, but zbv has 2; remove it")
        if self.virtual and self.kind == "file":
            yield Problem("virtual", f"{self.virtual}, but the file says which stages a rank has; remove it")

    @property
    def stages(self) -> int:
        """Of each pipeline rank, unless a file says."""
        return self.virtual or (2 if self.kind in ("interleaved", "zbv") else 1)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Where each part of the model runs, and when."""

    decoder: LayoutConfig = setting(LayoutConfig, "token table, layers, head, MTP depths")
    experts: ExpertsConfig = setting(ExpertsConfig, "routed experts")
    schedule: ScheduleConfig = setting(ScheduleConfig, "order of passes, transfers and sums")
    encoders: dict[str, LayoutConfig] = setting(dict, "each encoder, under its own name", rest=True)
