"""Encoders woven into the decoder's lists: right, bounded, free of deadlock, and where they should be."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from tests.plan.looms import ORDERS, drawn
from weft.plan.gantt import svg
from weft.plan.perfetto import perfetto
from weft.plan.pipelines import KINDS, compute, graph_of, names_encoders, parse_lists
from weft.plan.placing import complete
from weft.plan.prove import prove
from weft.plan.schedule import COMPUTE, Edge, Graph, Schedule, action
from weft.plan.simulate import simulate
from weft.plan.weave import Loom, Order, Tower, weave

ROOT = Path(__file__).parents[2]
SLOW = [pytest.param(first, 400, marks=pytest.mark.slow) for first in range(1000, 5000, 400)]


def read(graph, microbatches, *lines):
    return Schedule(graph, microbatches, tuple(tuple(map(action, line.split())) for line in lines))


def flat(cost=1.0):
    return lambda done: cost if done.op in COMPUTE else 0.0


def together(ranks, every=1, kind="1f1b", microbatches=8, **tower):
    """A decoder's pipeline, and an encoder of one stage on all of its ranks."""
    graph, lists = compute(kind, ranks, 2 if kind == "zbv" else 1, microbatches)
    seats = tuple((rank,) for rank in range(ranks))
    return Loom(
        graph, seats, (Tower("vision", ("vision_0",), (tuple(range(ranks)),), every, **tower),)
    ), lists


@pytest.mark.parametrize(("first", "count"), [(0, 100), *SLOW])
def test_random_placements(first, count):
    command = [sys.executable, "-W", "error", "-m", "tests.plan.sweep_looms", str(first), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_decoder_keeps_its_order_and_bounds_hold():
    for seed, order in product(range(4), ORDERS):
        made = drawn(random.Random(seed))
        least = [made.loom.least(tower, made.lists, made.microbatches) for tower in made.loom.towers]
        groups = [-(-made.microbatches // tower.every) for tower in made.loom.towers]
        for ahead in (0, max(groups if order == "first" else least)):
            graph, lists = made.woven(order, ahead)
            for rank, seats in enumerate(made.loom.seats_of):
                for seat in seats:
                    own = tuple(done for done in lists[seat] if done.unit in made.loom.decoder.home)
                    assert own == made.lists[rank]
            proof = prove(complete(graph, lists, cost=made.cost))
            assert not proof.faults, proof.text
            for tower in made.loom.towers if ahead else ():
                assert proof.groups[tower.name] <= ahead


def test_bounds_that_are_too_small_are_refused():
    loom, lists = together(4, every=2)
    fix = (
        r"3 at once \(4 groups of 2 in a step, order lead\); set plan.schedule.encoder_groups_in_flight to 3"
    )
    with pytest.raises(ValueError, match=f"2 groups of vision in flight, but these lists need {fix}"):
        weave(loom, lists, "lead", 2, 8, flat())
    with pytest.raises(ValueError, match="need 4 at once"):
        weave(loom, lists, "first", 3, 8, flat())
    for order, ahead in (("lead", 3), ("bubble", 3), ("first", 4)):
        proof = prove(complete(*weave(loom, lists, order, ahead, 8, flat())))
        assert not proof.faults
        assert proof.groups == {"vision": ahead}
    one, lists = together(1)
    assert prove(complete(*weave(one, lists, "lead", 0, 8, flat()))).groups == {"vision": 1}


def test_the_three_orders():
    loom, lists = together(2, every=2, microbatches=4)
    found = {}
    for order in ORDERS:
        _, woven = weave(loom, lists, order, 2, 4, flat())
        found[order] = [" ".join(map(str, actions)).replace("vision_0", "v") for actions in woven]
    assert found["first"][1] == (
        "F(v,0) F(v,1) F(1,0) B(1,0) W(1,0) F(1,1) B(1,1) W(1,1) F(1,2) B(1,2) W(1,2) F(1,3) B(1,3) W(1,3) "
        "B(v,0) W(v,0) B(v,1) W(v,1)"
    )
    assert found["lead"][0] == (
        "F(v,0) F(0,0) F(0,1) B(0,0) W(0,0) F(v,1) F(0,2) B(0,1) W(0,1) B(v,0) W(v,0) F(0,3) B(0,2) W(0,2) "
        "B(0,3) W(0,3) B(v,1) W(v,1)"
    )
    assert found["bubble"][0].startswith(
        "F(v,0) F(0,0) F(0,1) F(v,1) B(0,0)"
    )  # while the other rank computes


def test_encoders_apart_are_stages_in_front():
    graph, lists = compute("1f1b", 2, 1, 6)
    tower = Tower("vision", ("vision_0", "vision_1"), ((0,), (1,)))
    loom = Loom(graph, ((2,), (3,)), (tower,))
    schedule = complete(*weave(loom, lists, "lead", 0, 6, flat()))
    apart, deep = simulate(schedule, flat()), compute("1f1b", 4, 1, 6)
    assert apart.makespan <= simulate(complete(*deep), flat()).makespan + 1e-9
    assert prove(schedule).groups == {"vision": 4}


def test_a_frozen_encoder_runs_ahead_up_to_the_bound():
    graph, lists = compute("1f1b", 2, 1, 8)
    loom = Loom(graph, ((1,), (2,)), (Tower("vision", ("vision_0",), ((0,),), frozen=True),))
    for ahead in (1, 2, 5):
        schedule = complete(*weave(loom, lists, "lead", ahead, 8, flat()), cost=flat())
        proof = prove(schedule)
        assert not proof.faults
        assert proof.groups == {"vision": ahead}
        assert proof.live[0] == 0
        assert not {a.op for a in schedule.lists[0]} & {"B", "W", "REDUCE"}
        line = simulate(schedule, lambda done: 0.1 if done.unit == "vision_0" else flat()(done))
        start = {str(span.action): span.start for span in line.spans if span.action.op == "F"}
        for i in range(1, 8 - ahead):  # the reader asks for it one pass early
            assert start[f"F(vision_0,{i + ahead})"] >= start[f"F(0,{i - 1})"]
        assert line.peaks()[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bubble_is_never_slower_than_lead(kind):
    """On shared seats, of lists that are built and simulated for the same costs."""
    for ranks, every, ahead, seed in product((1, 3), (1, 3), (0, 8), range(1)):
        rng = random.Random(f"{kind} {ranks} {every} {seed}")
        joined = frozenset({"vision_0"} if rng.random() < 0.3 else ())
        loom, lists = together(ranks, every, kind, joined=joined)
        costs = {(op, s): rng.choice((0.2, 1.0, 1.7)) for op in "FBW" for s in loom.graph.home}
        costs |= {(op, "vision_0"): rng.choice((0.01, 0.1, 0.5)) for op in "FBW"}

        def cost(done, costs=costs):
            return costs.get((done.op, done.unit), 0.0)

        times = {}
        for order in ("lead", "bubble"):
            graph, woven = weave(loom, lists, order, ahead, 8, cost)
            times[order] = simulate(complete(graph, woven, cost=cost), cost).makespan
        assert times["bubble"] <= times["lead"] * (1 + 1e-9), (ranks, every, ahead, seed)


def hidden(ranks: int, microbatches: int, share: float) -> dict[Order | str, float]:
    """Seconds of a step without and with an encoder that takes this share of the bubble, (P-1)(t_f+t_b)."""
    loom, lists = together(ranks, microbatches=microbatches)
    each = share * (ranks - 1) / microbatches  # of F, B and W of a group on each rank

    def cost(done):
        return 0.0 if done.op not in COMPUTE else each if done.unit == "vision_0" else 1.0

    found: dict[Order | str, float] = {"alone": 3.0 * (microbatches + ranks - 1), "group": 3 * each}
    for order in ORDERS:
        graph, woven = weave(loom, lists, order, microbatches, microbatches, cost)
        found[order] = simulate(complete(graph, woven, cost=cost), cost).makespan
    return found


def test_the_encoder_is_hidden_in_the_bubble():
    """An encoder on all ranks of 1F1B, by the share of the bubble that it takes; B and W twice F.

    What is not hidden: the first group's forward pass, the last one's backward pass, and the backward passes
    that do not fit between the first gradients and the end of the first rank, (P-1) t_f, as the decoder's
    lists stay as they are.
    """
    print("\n ranks  microbatches  encoder/bubble  decoder alone    first     lead   bubble")  # noqa: T201
    for ranks, microbatches, share in product((2, 4), (8, 16), (0.25, 0.5, 1.0)):
        found = hidden(ranks, microbatches, share)
        words = "".join(f"{found[name]:9.2f}" for name in ORDERS)
        print(f"{ranks:6} {microbatches:13} {share:15} {found['alone']:14.2f}{words}")  # noqa: T201
        over = max(0.0, 2 * share - 1) * (ranks - 1)
        assert found["first"] == pytest.approx(found["alone"] + share * 3 * (ranks - 1))
        assert found["bubble"] <= found["alone"] + over + 2.5 * found["group"]
        assert found["bubble"] < found["lead"]


def test_lists_of_seats_from_a_file():
    loom, lists = together(2, every=2)
    made = complete(*weave(loom, lists, "bubble", 0, 8, flat()))
    found = parse_lists(made.text, "file")
    assert names_encoders(found)
    assert not names_encoders(lists)
    assert graph_of(found) == loom.decoder
    assert weave(loom, found, "bubble", 0, 8, flat()) == (loom.graph, found)
    assert complete(loom.graph, found).lists == made.lists
    with pytest.raises(ValueError, match=r"POST\(0>1,0\) is in lists without encoders"):
        weave(loom, complete(loom.decoder, lists).lists, "lead", 0, 8, flat())
    assert not prove(complete(loom.graph, found)).faults


def test_lists_that_cannot_run_are_woven_and_refused():
    loom, lists = together(2, microbatches=2)
    stuck = (tuple(reversed(lists[0])), lists[1])
    proof = prove(complete(*weave(loom, stuck, "lead", 0, 2, flat())))
    assert proof.faults


def joined():
    home = {"vision_0": (0, 1), "audio_0": (0, 1), "0": (0,), "1": (1,)}
    routed = (Edge("vision_0", "0"), Edge("audio_0", "0"))
    return Graph(home, (*routed, Edge("0", "1")), {}, frozenset(), frozenset(routed), frozenset(home))


def test_meetings_in_another_order():
    """Each seat has come to what the other one does later."""
    graph = joined()
    towers = (Tower("vision", ("vision_0",), ((0, 1),)), Tower("audio", ("audio_0",), ((0, 1),)))
    towers = tuple(replace(tower, joined=frozenset(tower.stages)) for tower in towers)
    chain, lists = compute("1f1b", 2, 1, 1)
    schedule = complete(*weave(Loom(chain, ((0,), (1,)), towers), lists, "lead", 0, 1, flat()))
    assert not prove(schedule).faults
    text = schedule.text.splitlines()
    first, second = "F(vision_0,0)", "F(audio_0,0)"
    text[1] = text[1].replace(first, "x").replace(second, first).replace("x", second)
    swapped = read(schedule.graph, 1, *text)
    message = next(fault.message for fault in prove(swapped).faults if fault.rule == "deadlock")
    assert f"rank 0 {first}" in message
    assert f"waits for rank 1 {first}" in message
    assert f"which comes after {second}" in message
    assert "put them in the same order on all" in message
    with pytest.raises(ValueError, match="to which not all its ranks come"):
        simulate(swapped, flat())
    text = schedule.text.splitlines()
    text[1] = (
        text[1].replace("W(vision_0,0) ", "", 1).replace("REDUCE(vision_0)", "W(vision_0,0) REDUCE(vision_0)")
    )
    apart = text[1].replace("B(vision_0,0) W(vision_0,0)", "B(vision_0,0) FREE(1) W(vision_0,0)")
    said = prove(read(graph, 1, text[0], apart)).text
    assert "only one of them has W right after it: make it so on both, or on none" in said


def test_graphs_that_cannot_be():
    def said(**change):
        loom, lists = together(2, every=2, frozen=True)
        graph, woven = weave(loom, lists, "lead", 0, 8, flat())
        return prove(complete(replace(graph, **change), woven)).text

    assert not said()
    assert "ranks (0, 1) and (0,), which overlap: name it among the routed" in said(routed=frozenset())
    assert "has passes of 2 and 3 microbatches" in said(every={"vision_0": 2, "0": 3})
    assert "brings gradients back from 0, which is frozen" in said(frozen=frozenset({"0"}))


def test_what_a_frozen_or_grouped_stage_does_not_have():
    loom, lists = together(1, every=2, microbatches=3, frozen=True)
    schedule = complete(*weave(loom, lists, "lead", 0, 3, flat()))
    for wrong, message in {
        "B(vision_0,0)": "is of a frozen stage, which has only F: remove it",
        "REDUCE(vision_0)": "is of a frozen stage, which has only F: remove it",
        "F(vision_0,2)": "is about a group of microbatches that does not exist; there are 2, from 0",
        "POST(vision_0<0,0)": "is of gradients of vision_0, which is frozen: remove it",
    }.items():
        text = schedule.text.replace("STEP", f"{wrong} STEP")
        assert message in prove(read(schedule.graph, 3, text)).text


def test_pictures():
    made = drawn(random.Random(3))
    line = simulate(made.schedule("bubble"), made.cost, lambda post: 0.1)
    assert "vision_0" in svg({"simulated": line})
    events = perfetto({"simulated": line})["traceEvents"]
    starts = {event["id"] for event in events if event["ph"] == "s"}
    assert starts == {event["id"] for event in events if event["ph"] == "f"}


def test_large_lists_in_seconds():
    loom, lists = together(8, every=4, microbatches=32)
    start = time.process_time()
    schedule = complete(*weave(loom, lists, "bubble", 0, 32, flat()))
    assert not prove(schedule).faults
    assert time.process_time() - start < 20
