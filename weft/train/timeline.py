"""When each action of a run's last step ran, beside a simulation with the costs that were measured.

``timeline.json`` in the run directory is what the report shows: ``{step, schedule, stages, microbatches,
kept, allowed, executed, simulated}``. For each pipeline rank, ``kept`` says how many passes had their
activations on the device at most, ``allowed`` what the proof of the schedule foretold. ``executed`` and
``simulated`` are each ``{makespan, bubble, rows}``: seconds, and rows as in ``weft.plan.timeline`` where
ranks are pipeline ranks. ``trace/step_0000100.json`` has the same spans for ui.perfetto.dev.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from weft.config.errors import RunError
from weft.plan.perfetto import perfetto
from weft.plan.prove import Proof
from weft.plan.schedule import Action, Schedule
from weft.plan.simulate import Channel, Seconds, channel, simulate
from weft.plan.timeline import Row, Span, Timeline, merged
from weft.train.metrics import replace_text

FILE = "timeline.json"
Part = dict[str, Any]
"""What a rank tells of its step: ``rows``, and the most passes ``kept`` at one time."""


def part(spans: Iterable[Span], kept: int) -> Part:
    """Of this rank's spans, as JSON can hold it."""
    return {"rows": _rows(Timeline(tuple(spans))), "kept": kept}


def _rows(line: Timeline) -> list[Row]:
    """Times to a tenth of a microsecond."""
    return [(*row[:3], round(row[3], 7), round(row[4], 7)) for row in line.as_rows()]


@dataclass(frozen=True)
class Timelines:
    """Of one step.

    Attributes:
        about: ``timeline.json`` without the rows.
        executed: as measured.
        simulated: the same schedule with mean costs.
    """

    about: dict[str, Any]
    executed: Timeline
    simulated: Timeline

    @property
    def both(self) -> dict[str, Timeline]:
        """By name."""
        return {"executed": self.executed, "simulated": self.simulated}


def compare(parts: Sequence[Part], schedule: Schedule, proof: Proof) -> Timelines:
    """The executed step and its simulation.

    Args:
        parts: of one rank of each pipeline rank, in any order.
        schedule: what they ran.
        proof: of it.
    """
    parts = sorted(parts, key=lambda part: part["rows"][0][0])
    lines = [Timeline.from_rows(part["rows"]) for part in parts]
    executed = settled(merged(lines, meet=True), schedule)
    simulated = simulate(schedule, costs(schedule, executed), transfers(schedule, executed))
    about = {
        "stages": len(schedule.graph.home),
        "microbatches": schedule.microbatches,
        "kept": [part["kept"] for part in parts],
        "allowed": list(proof.live),
    }
    return Timelines(about, executed, simulated)


def write_timelines(run_dir: Path, step: int, name: str, made: Timelines) -> None:
    """Write ``timeline.json`` and the trace of a step whose schedule is called ``name``.

    Raises:
        RunError: a file cannot be written.
    """
    about = {"step": step, "schedule": name, **made.about}
    for key, line in made.both.items():
        about[key] = {"makespan": line.makespan, "bubble": line.bubble_share, "rows": _rows(line)}
    trace = json.dumps(perfetto(made.both), separators=(",", ":"))
    replace_text(run_dir / trace_name(step), trace + "\n")
    replace_text(run_dir / FILE, json.dumps(about, separators=(",", ":"), allow_nan=False) + "\n")


def trace_name(step: int) -> str:
    """The Perfetto file of a step, inside the run directory."""
    return f"trace/step_{step:07d}.json"


def read_timelines(about: dict[str, Any]) -> Timelines:
    """What was in ``timeline.json``.

    Raises:
        RunError: it is not of that form.
    """
    try:
        lines = [Timeline.from_rows(about[key]["rows"]) for key in ("executed", "simulated")]
        rest = {key: about[key] for key in ("step", "schedule", "stages", "microbatches", "kept", "allowed")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{FILE} cannot be read: {error!r}; restore it from a copy, or remove it") from error
    return Timelines(rest, *lines)


def settled(line: Timeline, schedule: Schedule) -> Timeline:
    """The spans of an executor, which tells when each action had the rank, as a timeline means them.

    The span of a whole backward pass is that of B and W. A transfer begins when both ends have posted it, and
    is over when the receiver has waited for it (or earlier, but nobody looked). STEP begins when all ranks
    have come to it. As clocks of ranks agree only about, nothing is let end before it begins.
    """
    starts: defaultdict[Action, float] = defaultdict(float)
    ends: dict[Action, float] = {}
    over: dict[tuple[int, Action], float] = {}  # whole backward passes, of each rank by itself
    whole, home = _whole(schedule), schedule.graph.home
    for rank, _, action, start, end in line.spans:
        if action.op in ("POST", "STEP"):
            starts[action] = max(starts[action], start)
        elif action.op == "WAIT" and rank in home[action.unit if action.back else action.target]:
            ends[action._replace(op="POST")] = max(end, ends.get(action._replace(op="POST"), end))
        elif action.op == "W" and action[1:3] in whole:
            over[rank, action] = over[rank, action._replace(op="B")] = end
    spans: list[Span] = []
    for span in line.spans:
        last = over.get((span.rank, span.action))
        start, end = starts.get(span.action, span.start), last or ends.get(span.action, span.end)
        start = end if last and span.action.op == "W" else start
        spans.append(span._replace(start=start, end=max(start, end)))
    return Timeline(tuple(spans))


def _whole(schedule: Schedule) -> frozenset[tuple[str, int]]:
    """Stages and microbatches whose B is directly followed by W."""
    pairs = (pair for actions in schedule.lists for pair in pairwise(actions))
    return frozenset(b[1:3] for b, w in pairs if b.op == "B" and w == b._replace(op="W"))


def costs(schedule: Schedule, line: Timeline) -> Seconds:
    """Mean seconds of each op of each stage; those of whole backward passes and of others are kept apart."""
    whole = _whole(schedule)

    def kind(action: Action) -> tuple[str, str, bool]:
        return action.op, action.unit, action.op in ("B", "W") and action[1:3] in whole

    found: defaultdict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for span in line.spans:
        found[kind(span.action)].append(span.end - span.start)
    mean = {key: fmean(times) for key, times in found.items()}
    return lambda action: mean[kind(action)]


def transfers(schedule: Schedule, line: Timeline) -> Seconds:
    """Seconds of a transfer: the shortest of its channel, for others were over before anybody looked."""
    home = schedule.graph.home
    shortest: dict[Channel, float] = {}
    for rank, _, action, start, end in line.spans:
        if action.op == "POST" and rank in home[action.unit]:
            key = channel(action)
            shortest[key] = min(shortest.get(key, end - start), end - start)
    return lambda post: shortest[channel(post)]
