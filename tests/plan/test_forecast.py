"""What a plan says of its pipeline: stages, the schedule, and when passes would run."""

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tiny import CONFIG
from weft.config.load import from_dict
from weft.plan.forecast import deadlock, drawn, forecast, pipeline_tables
from weft.plan.layout import plan_of_run
from weft.plan.show import show, summary
from weft.plan.table import as_text
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.count import count
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig


def piped(pattern: str = "*E*M**", **plan: Any) -> RunConfig:
    """A run of four sequences, one in each microbatch."""
    run = stdlib_lm()
    return replace(
        run,
        model=replace(CONFIG, pattern=pattern, mtp_num_depths=0),
        train=replace(run.train, global_batch_size=4, micro_batch_size=1),
        plan=from_dict(PlanConfig, plan),
    )


def shown(run: RunConfig, ranks: int) -> list[list[str]]:
    plan = plan_of_run(run, ranks)
    return [line.split() for line in as_text([summary(run, plan), *show(run, plan)]).splitlines()]


def test_stages_and_their_schedule() -> None:
    run = piped(decoder={"pp": 2}, schedule={"kind": "interleaved", "layers": [2, 2, 1, 1]})
    found = [" ".join(line) for line in shown(run, 2)]
    told = forecast(run, plan_of_run(run, 2))
    costs, bubble = [cost.total for cost in told.cut.costs], f"{told.timeline.bubble_share:.1%}"
    shares = [f"{cost / sum(costs):.1%}" for cost in costs]
    assert f"schedule interleaved, 4 stages on 2 ranks, 4 microbatches, bubble {bubble}" in found
    at = found.index("stages")
    sizes = pipeline_tables(run.model, told)[0].rows
    assert found[at + 1 : at + 6] == [
        "stage pipeline rank layers besides parameters FLOPs",
        f"0 0 *E token table {sizes[0][4]} {shares[0]}",
        f"1 1 *M {sizes[1][4]} {shares[1]}",
        f"2 0 * {sizes[2][4]} {shares[2]}",
        f"3 1 * norm, head {sizes[3][4]} {shares[3]}",
    ]
    told_of_all = f"bubble {bubble} by these FLOPs and free transfers, 11.1% if stages were even"
    assert found[at + 7].endswith(told_of_all)
    busy, live = told.timeline.busy_shares, told.proof.live
    assert found[at + 9].startswith(f"0 0 2 {busy[0]:.1%} {live[0]} F(0,0) F(0,1) F(2,0) F(2,1) F(0,2) ")
    assert found[at + 9].endswith(" ...")


@pytest.mark.parametrize("tied", [False, True])
def test_the_parameters_of_stages_are_those_of_the_model(tied: bool) -> None:
    run = piped(decoder={"pp": 2}, schedule={"kind": "zbv"})
    run = replace(run, model=replace(run.model, tie_word_embeddings=tied))
    told = forecast(run, plan_of_run(run, 2))
    rows = pipeline_tables(run.model, told)[0].rows
    shared = tied * run.model.vocab_size * run.model.hidden_size
    assert sum(int(row[4].replace(",", "")) for row in rows) == count(run.model).total + shared
    assert "".join(row[2] for row in rows) == run.model.pattern
    assert told.timeline.peaks() == dict(enumerate(told.proof.live))
    assert told.even == pytest.approx(1 / (3 * 2 * 4 + 1))


def test_the_timeline_counts_the_work_of_a_rank() -> None:
    run = piped(decoder={"pp": 2, "tp": 2}, schedule={"kind": "gpipe"})
    plan = plan_of_run(run, 4)
    told = forecast(run, plan)
    flops = 4 * run.data.seq_length * sum(cost.total for cost in told.cut.costs)
    assert sum(told.timeline.busy.values()) * 2 == pytest.approx(flops)  # two ranks share a stage
    text = drawn(told)
    ElementTree.fromstring(text)
    assert "simulated by FLOPs: gpipe, 2 stages, 4 microbatches" in text
    assert "FLOP, bubble" in text


def test_many_pipeline_ranks_are_cut_short() -> None:
    run = piped("*" * 20, decoder={"pp": 16})
    rows = pipeline_tables(run.model, forecast(run, plan_of_run(run, 16)))[1].rows
    assert [row[0] for row in rows] == [*map(str, range(10)), "...", "15"]
    assert all(len(row[4]) <= 88 for row in rows)


def test_pipeline_ranks_that_differ() -> None:
    run = piped(decoder={"pp": 2, "tp_of_stages": [1, 2]})
    found = shown(run, 4)
    assert ["decoder", "of", "pipeline", "rank", "0:", "2", "ranks,", "dp", "2"] in found
    assert ["decoder", "of", "pipeline", "rank", "1", "tp", "2"] in found
    assert ["tp", "2", "1", "[2", "3]"] in found


def test_one_stage_has_no_schedule_to_show() -> None:
    words = {word for line in shown(piped(), 1) for word in line}
    assert not {"schedule", "stages"} & words


def test_only_a_deadlock_is_drawn() -> None:
    assert deadlock(piped(decoder={"pp": 2}), 2) == ""
    assert deadlock(piped(decoder={"pp": 2}), 3) == ""
    assert deadlock(piped(decoder={"pp": 2}, schedule={"kind": "file", "file": "absent.txt"}), 2) == ""
