"""Timelines of runs: what ranks measured becomes one picture, and a simulation with the measured costs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.train.fake_run import write_run
from tests.train.runs import small
from weft.build.model import assemble
from weft.config.errors import RunError
from weft.data.batch import Batch
from weft.parallel.comm import Comm
from weft.parallel.mesh import mesh_of
from weft.parallel.threads import run_threads
from weft.plan.pipelines import SPLIT, compute
from weft.plan.placing import complete
from weft.plan.prove import prove
from weft.plan.schedule import Schedule, action
from weft.plan.simulate import simulate
from weft.plan.step import schedule_of
from weft.plan.timeline import Span, Timeline
from weft.recipes.registry import build
from weft.spec.data import DataConfig
from weft.spec.layout import Kind, LayoutConfig, PlanConfig, ScheduleConfig
from weft.spec.run import RunConfig, TrainConfig
from weft.train.loop import Trainer
from weft.train.report import write_report
from weft.train.run import train
from weft.train.team import decoder_only
from weft.train.timeline import Part, Timelines, compare, part, read_timelines, write_timelines

SECONDS = {"F": 3e-3, "B": 4e-3, "W": 2e-3, "STEP": 1e-3, "REDUCE": 5e-4}


def scheduled(kind: str, ranks: int = 2, stages: int = 1, microbatches: int = 4) -> Schedule:
    graph, lists = compute(kind, ranks, stages, microbatches)
    return complete(graph, lists, split=kind in SPLIT)


def told(schedule: Schedule, line: Timeline) -> list[Part]:
    """What executors would tell of a timeline: launches of transfers, a queue for W, clocks of their own."""

    def seen(span: Span) -> Span:
        match span.action.op:
            case "POST":
                return span._replace(end=span.start + 1e-6)
            case "W" if span.end == span.start:
                return span._replace(start=span.start - 1e-5)
            case _:
                return span

    ranks = range(schedule.graph.seats)
    lines = [Timeline(tuple(seen(span) for span in line.spans if span.rank == rank)) for rank in ranks]
    live = prove(schedule).live
    parts = [part(own.shifted(3.5 * rank).spans, live[rank]) for rank, own in enumerate(lines)]
    return list(reversed(json.loads(json.dumps(parts))))


@pytest.mark.parametrize(("kind", "stages"), [("1f1b", 1), ("gpipe", 1), ("zbv", 2)])
def test_a_simulation_is_measured_and_simulated_again(kind: str, stages: int) -> None:
    schedule = scheduled(kind, stages=stages)
    line = simulate(schedule, lambda made: SECONDS[made.op], lambda post: 7e-4)
    made = compare(told(schedule, line), schedule, prove(schedule))
    assert made.executed.makespan == pytest.approx(line.makespan, abs=1e-6)
    assert made.executed.bubble_share == pytest.approx(line.bubble_share, abs=1e-3)
    assert made.simulated.makespan == pytest.approx(line.makespan, rel=1e-2)
    assert made.simulated.bubble_share == pytest.approx(line.bubble_share, abs=1e-2)
    assert [span[:3] for span in made.simulated.spans] == [span[:3] for span in line.spans]
    queued = [
        [span.end - span.start for span in own.spans if span.action.op == "W"] for own in made.both.values()
    ]
    assert sum(queued[0]) == pytest.approx(sum(queued[1]), abs=1e-4)
    assert made.about["kept"] == made.about["allowed"] == list(prove(schedule).live)


def test_transfers_and_steps_begin_with_the_last_rank() -> None:
    schedule = scheduled("1f1b", microbatches=1)
    line = simulate(schedule, lambda made: SECONDS[made.op], lambda post: 7e-4)
    first = {(1, action("POST(0>1,0)")), (1, action("STEP"))}  # the receiver and the last rank wait for long
    early = [
        span._replace(start=span.start - 2e-3) if (span.rank, span.action) in first else span
        for span in line.spans
    ]
    made = compare(told(schedule, Timeline(tuple(early))), schedule, prove(schedule)).executed
    length = {(span.rank, str(span.action)): span.end - span.start for span in made.spans}
    assert length[0, "POST(0>1,0)"] == length[1, "POST(0>1,0)"] == pytest.approx(7e-4, abs=1e-6)
    assert length[0, "STEP"] == length[1, "STEP"] == pytest.approx(1e-3, abs=1e-6)


class Samples:
    """Sample g, the same wherever it is read."""

    def microbatch(self, start: int, count: int) -> Batch:
        assert count == 1
        return tiny.batch((16,), seed=start)

    def state(self, samples: int) -> dict[str, Any]:
        return {"samples": samples}


def traced(kind: Kind) -> Timelines:
    """The second step of two pipeline ranks on threads."""
    plan = PlanConfig(decoder=LayoutConfig(pp=2), schedule=ScheduleConfig(kind=kind))
    settings = TrainConfig(train_iters=2, global_batch_size=4, micro_batch_size=1, precision="fp64")
    run = RunConfig(model=tiny.CONFIG, train=settings, data=DataConfig(seq_length=16), plan=plan)

    def work(comm: Comm) -> Timelines:
        mesh = mesh_of(plan, comm, run.model)
        model = assemble(run.model, "fp64", torch.device("cpu"), 1, mesh)
        trainer = Trainer(run, decoder_only(model, mesh), Samples())
        for step in (1, 2):
            trainer.step(step, trainer.batches(trainer.samples))
        parts = comm.gather_objects(part(trainer.spans, trainer.executor.peak) if mesh.first else None)
        return compare([own for own in parts if own], *schedule_of(plan.schedule, trainer.team.cut, 4, 0))

    return run_threads(2, work, 60)[0]


@pytest.mark.parametrize("kind", ["1f1b", "zbv"])
def test_a_pipeline_of_threads(kind: Kind, tmp_path: Path) -> None:
    made = traced(kind)
    assert made.about["kept"] == made.about["allowed"]
    assert made.executed.ranks == made.simulated.ranks == (0, 1)
    assert all(span.start <= span.end for span in made.executed.spans)
    assert made.executed.peaks() == dict(enumerate(made.about["kept"]))
    run = write_run(tmp_path, steps=1, moe=False)
    write_timelines(run, 4, kind, made)
    trace = json.loads((run / "trace" / "step_0000004.json").read_text())
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["executed", "simulated"]
    page = write_report(run).read_text()
    assert f"Step 4: {kind}, {made.about['stages']} stages, 4 microbatches." in page
    assert f"<dd>{made.executed.bubble_share:.1%}<small>{made.simulated.bubble_share:.1%} simulated" in page


def test_what_was_written_is_read() -> None:
    about = {"step": 1, "schedule": "1f1b", "stages": 1, "microbatches": 1, "kept": [1], "allowed": [1]}
    rows = [[0, "compute", "F(0,0)", 0.0, 0.5]]
    made = read_timelines(about | {"executed": {"rows": rows}, "simulated": {"rows": []}})
    assert made.executed.makespan == 0.5
    for wrong in ({"rows": [[0]]}, {"rows": [[0, "compute", "G(0,0)", 0.0, 1.0]]}, {}, []):
        with pytest.raises(RunError, match="timeline.json cannot be read"):
            read_timelines(about | {"executed": wrong, "simulated": {"rows": []}})


def test_a_run_of_one_process_keeps_its_last_step(tmp_path: Path) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"))
    settings, checkpoint = replace(config.train, train_iters=1), replace(config.checkpoint, save=False)
    run = train(replace(config, train=settings, checkpoint=checkpoint), {})
    assert "<h3>Timeline</h3>" in (run / "report.html").read_text()
    assert (run / "trace" / "step_0000001.json").exists()
    about = json.loads((run / "timeline.json").read_text())
    texts = [text for _, _, text, _, _ in about["executed"]["rows"]]
    assert texts == ["F(0,0)", "B(0,0)", "W(0,0)", "F(0,1)", "B(0,1)", "W(0,1)", "REDUCE(0)", "STEP"]
