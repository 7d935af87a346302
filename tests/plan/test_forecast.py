"""What a plan says of its pipeline: stages, the schedule, and when passes would run."""

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tiny import CONFIG
from weft.config.load import from_dict
from weft.plan.forecast import deadlock, drawn, forecast, pipeline_tables
from weft.plan.layout import plan_of_run
from weft.plan.modules_table import largest_of_all, ranks_words
from weft.plan.plans import plans_of_run
from weft.plan.schedule import COMPUTE
from weft.plan.show import show, summary
from weft.plan.table import as_text
from weft.recipes.digits import digits_vlm
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.count import count, state_of
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


def seen(freeze: tuple[str, ...] = (), **plan: Any) -> RunConfig:
    """A run with an encoder, in fp32, of four microbatches."""
    run = digits_vlm()
    train = replace(run.train, global_batch_size=8, micro_batch_size=1, freeze=freeze)
    return replace(run, train=train, plan=from_dict(PlanConfig, plan))


def test_modules_and_seats() -> None:
    decoder, vision = {"ranks": "1-3", "dp": 3}, {"ranks": "0-1", "pp": 2}
    run = seen(decoder=decoder, vision=vision, schedule={"encoder_order": "first"})
    found = [" ".join(line) for line in shown(run, 4)]
    told = forecast(run, plan_of_run(run, 4))
    at = found.index("modules")
    parts = count(run.model).total
    assert found[at + 2 : at + 4] == [
        "vision 0-1 pp 2 level 0 151,872 41,216",
        f"decoder 1-3 dp 3 level 0 {parts:,}",
    ]
    assert "schedule 1f1b, encoders first, 3 stages on 3 seats, 3 microbatches, " in "\n".join(found)
    rows = [line for line in found if line.startswith(("0 1 vision_1 0 ", "1 2-3 0 ", "2 0 vision_0 "))]
    passes = "F(vision_0,0) F(vision_0,1) F(vision_0,2) B(vision_0,0)"
    assert len(rows) == 3
    assert passes in rows[2]
    assert told.timeline.peaks() == dict(enumerate(told.proof.live))
    text = drawn(told)
    ElementTree.fromstring(text)
    assert ">seat 2<" in text
    assert ">rank " not in text


def test_work_of_an_encoder_is_cut_over_its_ranks() -> None:
    """The same pictures, on one rank or on four: the FLOPs of all ranks together are the same."""
    work = []
    for layout in ({"ranks": "0"}, {"dp": 4}, {"tp": 2, "pp": 2}):
        run = seen(vision=layout)
        told = forecast(run, plan_of_run(run, 4))
        passes = (span for span in told.timeline.spans if span.action.op in COMPUTE)
        spans = (span for span in passes if span.action.unit.startswith("vision"))
        work.append(sum((span.end - span.start) * len(told.seats[span.rank]) for span in spans))
    assert work[1:] == pytest.approx([work[0]] * 2)


def test_a_frozen_encoder_has_forward_passes_and_weights_only() -> None:
    run = seen(freeze=("vision",))
    found = "\n".join(" ".join(line) for line in shown(run, 2))
    assert "B(vision_0" not in found
    assert "193,088 parameters, not trained: all" in found
    sizes = [spec.numel * state_of(spec, "fp32").weight for spec in run.encoders["vision"].params()]
    alone = replace(run, encoders={})
    own, other = (largest_of_all(each, plans_of_run(each, 2))[1] for each in (run, alone))
    assert (own.weights - other.weights, own.moments) == (sum(sizes), other.moments)


def test_memory_counts_what_rests_of_encoders() -> None:
    """Weights, gradients and two moments of every parameter in fp32, more and more of them cut in two.

    From level 1 to 2 this rank's part of weights (and at 1 of gradients) lies apart from what layers read.
    """
    for level, share in ((0, 4.0), (1, 4.0), (2, 3.0), (3, 2.0)):
        run = seen(vision={"store": {"level": level}})
        alone = replace(run, encoders={}, plan=PlanConfig())
        own, other = (largest_of_all(each, plans_of_run(each, 2))[1].state for each in (run, alone))
        elements = sum(spec.numel for spec in run.encoders["vision"].params())
        assert own - other == pytest.approx(4 * share * elements, rel=1e-3)


def test_ranks_in_words() -> None:
    assert ranks_words([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"
