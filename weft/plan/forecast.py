"""What a plan says of its pipeline: stages, the order of their passes, and when these would run.

Costs are the FLOPs of stages (``weft.plan.stages``, ``weft.plan.step.cost_of``): a picture of how even they
are, not of a device.
"""

from dataclasses import dataclass
from itertools import islice
from textwrap import shorten

from weft.config.errors import ConfigError
from weft.plan.cycle import svg as cycle_svg
from weft.plan.gantt import svg
from weft.plan.layout import Plan
from weft.plan.modules_table import ranks_words
from weft.plan.plans import plans_of_run
from weft.plan.prove import Proof
from weft.plan.schedule import COMPUTE, Action, Schedule
from weft.plan.simulate import bubble_formula, simulate
from weft.plan.stages import Cut, Piece
from weft.plan.step import MEDIA, cost_of, step_of
from weft.plan.table import Row, Table
from weft.plan.timeline import Timeline
from weft.spec.hybrid import HybridConfig
from weft.spec.run import RunConfig

# The most that are written out: pipeline ranks, letters of their passes, and seats beside a picture.
_RANKS, _LETTERS, _SEATS = 12, 88, 5
_ORDERS = {"lead": "lead", "first": "first", "bubble": "in bubbles"}


@dataclass(frozen=True)
class Forecast:
    """The schedule of a step, and how it would run.

    Attributes:
        name: kind, or file; and when encoders run.
        cut: the decoder in stages.
        schedule: the lists.
        proof: what is known of them.
        timeline: FLOPs of a rank take the place of seconds; transfers are free.
        even: bubble share if all stages cost the same, where a formula is known.
        seats: ranks of each seat, where the run has encoders.
    """

    name: str
    cut: Cut
    schedule: Schedule
    proof: Proof
    timeline: Timeline
    even: float | None
    seats: tuple[tuple[int, ...], ...] = ()

    @property
    def words(self) -> str:
        """``1f1b, 4 stages, 8 microbatches``."""
        stages, parts = len(self.schedule.graph.home), self.schedule.microbatches
        seats = self.schedule.graph.seats
        on = f" on {seats} ranks" if stages > seats > 1 else ""
        if self.seats:
            on = f" on {_count(seats, 'seat')}"
        return f"{self.name}, {_count(stages, 'stage')}{on}, {_count(parts, 'microbatch')}"


def _count(number: int, name: str) -> str:
    plural = "es" if name.endswith("ch") else "s"
    return f"{number:,} {name}{plural * (number != 1)}"


def forecast(run: RunConfig, plan: Plan) -> Forecast:
    """How a step of the run goes.

    Raises:
        ValueError: the schedule cannot be run, as ``check_run`` says.
    """
    config, made, plans = run.plan.schedule, _cut_of(plan), plans_of_run(run, plan.world)
    parts = plan.microbatches(run.train)
    schedule, proof = step_of(plans, run.modules, config, parts)
    if proof.faults:
        raise ValueError(proof.text)
    ranks = len(plan.dense.grid.ranks) // plan.dense.grid.size("pp")
    tokens = plan.together(run.train) * run.data.seq_length / ranks
    costs = cost_of(plans, run.modules, config, made)
    line = simulate(schedule, lambda action: tokens * costs(action) if action.op in COMPUTE else 0.0)
    name = config.file or config.kind
    if run.encoders:
        order = "" if config.file else f", encoders {_ORDERS[config.encoder_order]}"
        return Forecast(f"{name}{order}", made, schedule, proof, line, None, plans.seats)
    virtual = len(made.pieces) // schedule.graph.seats
    even = bubble_formula(config.kind, schedule.graph.seats, virtual, parts)
    return Forecast(name, made, schedule, proof, line, even)


def pipelined(run: RunConfig, plan: Plan) -> Forecast | None:
    """``forecast`` of a plan that has several stages, or of a run with encoders."""
    return forecast(run, plan) if run.encoders or (plan.cut and len(plan.cut.pieces) > 1) else None


def _cut_of(plan: Plan) -> Cut:
    if plan.cut is None:
        raise ValueError("stages depend on the model: make the plan with it")
    return plan.cut


def drawn(told: Forecast) -> str:
    """SVG text of the simulated step."""
    seats = "; ".join(f"{i} is {_ranks_of(ranks)}" for i, ranks in enumerate(told.seats[:_SEATS]))
    named = f"; seats: {seats}{' ...' * (len(told.seats) > _SEATS)}" if told.seats else ""
    text = svg({f"simulated by FLOPs: {told.words}{named}": told.timeline}, clock="FLOP")
    return text.replace(">rank ", ">seat ") if told.seats else text  # what lanes are called


def _ranks_of(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {ranks_words(ranks)}"


def deadlock(run: RunConfig, ranks: int) -> str:
    """SVG text of pipeline ranks that wait for each other in the run's schedule; empty if none do."""
    try:
        plans = plans_of_run(run, ranks)
        parts = plans.decoder.microbatches(run.train)
        schedule, proof = step_of(plans, run.modules, run.plan.schedule, parts)
    except (ConfigError, ValueError):  # refused for something else
        return ""
    return cycle_svg(schedule, proof.cycle) if proof.cycle else ""


def schedule_row(told: Forecast) -> Row:
    """The schedule in one row."""
    return "schedule", f"{told.words}, bubble {told.timeline.bubble_share:.1%}"


def pipeline_tables(model: HybridConfig, told: Forecast) -> list[Table]:
    """Stages of the decoder, and what each pipeline rank, or each seat, does."""
    bubble = f"bubble {told.timeline.bubble_share:.1%} by these FLOPs and free transfers"
    bubble += f", {told.even:.1%} if stages were even" if told.even is not None else ""
    bubble += f", if encoders fill {MEDIA:.0%} of the tokens" if told.seats else ""
    head = ("seat", "ranks") if told.seats else ("pipeline rank",)
    head = (*head, "stages", "busy", "kept at most", "first passes")
    tables = [Table(f"schedule: {told.words}; {bubble}", head, tuple(_rank_rows(told)))]
    if len(told.cut.pieces) > 1:
        head = ("stage", "pipeline rank", "layers", "besides", "parameters", "FLOPs")
        title = "stages of the decoder" if told.seats else "stages"
        tables.insert(0, Table(title, head, tuple(_stage_rows(model, told.cut))))
    return tables


def _stage_rows(model: HybridConfig, made: Cut) -> list[Row]:
    sizes, whole = [0] * len(made.pieces), sum(cost.total for cost in made.costs)
    for spec in model.params():
        for stage, piece in enumerate(made.pieces):
            sizes[stage] += spec.numel * piece.has(spec.name)
    return [
        (
            str(stage),
            str(rank),
            model.parts.main[piece.layers.start : piece.layers.stop] or "none",
            _besides(model, piece),
            f"{sizes[stage]:,}",
            f"{cost.total / whole:.1%}",
        )
        for stage, (piece, rank, cost) in enumerate(zip(made.pieces, made.home, made.costs, strict=True))
    ]


def _besides(model: HybridConfig, piece: Piece) -> str:
    """What a stage has besides main layers."""
    found = ["token table"] * piece.table
    if piece.last:
        found += ["norm", *["head"] * (not model.tie_word_embeddings), *["MTP"] * bool(model.depths)]
    return ", ".join(found)


def _rank_rows(told: Forecast) -> list[Row]:
    graph, busy = told.schedule.graph, told.timeline.busy_shares
    ranks = range(graph.seats)
    shown: list[int | None] = list(ranks)
    if len(ranks) > _RANKS:
        shown = [*ranks[: _RANKS - 2], None, ranks[-1]]
    return [
        ("...",) * (6 if told.seats else 5)
        if rank is None
        else (
            str(rank),
            *([ranks_words(told.seats[rank])] if told.seats else []),
            " ".join(graph.at(rank)),
            f"{busy[rank]:.1%}",
            f"{told.proof.live[rank]:,}",
            _passes(told.schedule.lists[rank]),
        )
        for rank in shown
    ]


def _passes(actions: tuple[Action, ...]) -> str:
    """The first passes of a list; a whole backward pass is two of them."""
    passes = (str(action) for action in actions if action.op in COMPUTE)
    return shorten(" ".join(islice(passes, _LETTERS)), _LETTERS, placeholder=" ...")
