"""The checker: what each rule refuses and says; what it accepts runs to the right end."""

import random
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from tests.plan.meaning import Wrong, oracle, outcome
from tests.plan.mutants import mutants, valid
from weft.plan.cycle import svg
from weft.plan.pipelines import compute
from weft.plan.placing import complete, forward_only
from weft.plan.prove import Proof, prove
from weft.plan.schedule import Action, Edge, Graph, Schedule, action


def read(graph: Graph, microbatches: int, *lists: str) -> Schedule:
    return Schedule(graph, microbatches, tuple(tuple(map(action, text.split())) for text in lists))


PAIR = Graph.chain([0, 1])
FIRST = "F(0,0) POST(0>1,0) WAIT(0>1,0) POST(0<1,0) WAIT(0<1,0) B(0,0) W(0,0) REDUCE(0) STEP"
SECOND = "POST(0>1,0) WAIT(0>1,0) F(1,0) B(1,0) POST(0<1,0) WAIT(0<1,0) W(1,0) REDUCE(1) STEP"
LONE = (
    "GATHER(0) F(0,0) OUT(0,0) F(0,1) FREE(0) GATHER(0) B(0,1) W(0,1) IN(0,0) B(0,0) FREE(0) W(0,0) "
    "REDUCE(0) STEP"
)


def pair(first: str = FIRST, second: str = SECOND, **limits: int) -> Proof:
    return prove(read(PAIR, 1, first, second), **limits)


def lone(text: str = LONE, **limits: int) -> Proof:
    return prove(read(Graph.chain([0]), 2, text), **limits)


def one(proof: Proof, rule: str) -> str:
    """The message of the only fault of a rule."""
    (message,) = (fault.message for fault in proof.faults if fault.rule == rule)
    return message


def test_accepts_what_generators_make() -> None:
    assert len(valid()) >= 200
    for name, schedule in valid().items():
        proof = prove(schedule)
        assert not proof.faults, f"{name}: {proof.text}"
        assert outcome(schedule) == oracle(schedule.graph, schedule.microbatches), name
        assert sorted(proof.order) == [(r, p) for r, a in enumerate(schedule.lists) for p in range(len(a))]
        runs = [[p for rank, p in proof.order if rank == r] for r in range(len(schedule.lists))]
        assert runs == [[*range(len(actions))] for actions in schedule.lists]


def test_order_has_waits_after_both_posts() -> None:
    graph, lists = compute("interleaved", 3, 2, 5)
    schedule = complete(graph, lists)
    posts: Counter[Action] = Counter()
    for rank, at in prove(schedule).order:
        made = schedule.lists[rank][at]
        if made.op == "WAIT":
            assert posts[made._replace(op="POST")] == 2
        posts[made] += 1


def test_forward_only() -> None:
    graph, _ = compute("interleaved", 2, 2, 3)
    schedule = forward_only(graph, 3, level=3, gather="stage")
    assert not prove(schedule, training=False).faults
    said = [fault.message for fault in prove(schedule).faults]
    assert "rank 0: STEP is missing: put it at the end" in said
    lists = ((*schedule.lists[0], action("B(0,0)"), action("STEP")), schedule.lists[1][1:])
    proof = prove(replace(schedule, lists=lists), training=False)
    assert [fault.rule for fault in proof.faults] == ["unknown", "unknown", "store", "missing"]


def test_counts_what_is_live_and_in_flight() -> None:
    assert pair().live == (1, 1)
    assert pair().in_flight == (1, 1)
    assert lone().live == (1,)
    assert lone(LONE.replace("OUT(0,0) ", "").replace("IN(0,0) ", "")).live == (2,)
    for ranks, microbatches in ((2, 6), (4, 8)):
        graph, lists = compute("1f1b", ranks, 1, microbatches)
        assert prove(complete(graph, lists)).live == tuple(range(ranks, 0, -1))


def test_a_limit_on_live() -> None:
    graph, lists = compute("gpipe", 2, 1, 3)
    schedule = complete(graph, lists)
    assert not prove(schedule, 3).faults
    first, second = prove(schedule, 2).faults
    assert schedule.lists[0][first.at] == action("F(0,2)")
    assert first.message == (
        f"rank 0: F(0,2) (at {first.at}) makes 3 forward passes kept, of 2 allowed (3 at the peak): put W of "
        "another before it, or OUT and IN"
    )
    assert second.rank == 1


@pytest.mark.parametrize(
    ("rule", "old", "new", "message"),
    [
        (
            "missing",
            "W(0,0) ",
            "",
            "W(0,0) is missing; what B(0,0) (at 5) makes leaks: put it after B(0,0) (at 5)",
        ),
        (
            "missing",
            "F(0,0) ",
            "",
            "F(0,0) is missing; POST(0>1,0) (at 0) starves: put it before POST(0>1,0) (at 0)",
        ),
        (
            "missing",
            " WAIT(0>1,0)",
            "",
            "WAIT(0>1,0) is missing; what POST(0>1,0) (at 1) makes leaks: put it after POST(0>1,0) (at 1)",
        ),
        (
            "missing",
            "POST(0>1,0) ",
            "",
            "POST(0>1,0) is missing; WAIT(0>1,0) (at 1) starves; WAIT(0>1,0) (at 1) of rank 1 never ends: "
            "put it after F(0,0) (at 0) and before WAIT(0>1,0) (at 1)",
        ),
        ("missing", " STEP", "", "STEP is missing: put it at the end"),
        ("twice", "F(0,0)", "F(0,0) F(0,0)", "F(0,0) (at 1) is already there at 0: remove one"),
        ("twice", "STEP", "STEP STEP", "STEP (at 9) is already there at 8: remove one"),
        (
            "order",
            "STEP",
            "STEP STEP",
            "STEP (at 8) must be last, but STEP (at 9) follows: move it to the end",
        ),
        (
            "order",
            "F(0,0) POST(0>1,0)",
            "POST(0>1,0) F(0,0)",
            "F(0,0) (at 1) must come before POST(0>1,0) (at 0), which sends its result: move one past "
            "the other",
        ),
        (
            "order",
            "POST(0>1,0) WAIT(0>1,0)",
            "WAIT(0>1,0) POST(0>1,0)",
            "POST(0>1,0) (at 2) must come before WAIT(0>1,0) (at 1), which waits for it: move one past "
            "the other",
        ),
        (
            "order",
            "WAIT(0<1,0) B(0,0)",
            "B(0,0) WAIT(0<1,0)",
            "WAIT(0<1,0) (at 5) must come before B(0,0) (at 4), which reads what it receives: move one past "
            "the other",
        ),
        (
            "order",
            "B(0,0) W(0,0)",
            "W(0,0) B(0,0)",
            "B(0,0) (at 6) must come before W(0,0) (at 5), which reads the gradients that it leaves: move "
            "one past the other",
        ),
        (
            "unknown",
            "F(0,0)",
            "F(0,0) F(2,0)",
            "F(2,0) (at 1) is about a stage that does not exist; there are 0, 1",
        ),
        ("unknown", "F(0,0)", "F(0,0) F(1,0)", "F(1,0) (at 1) belongs in the list of rank 1"),
        (
            "unknown",
            "F(0,0)",
            "F(0,0) F(0,1)",
            "F(0,1) (at 1) is about a microbatch that does not exist; there are 1, from 0",
        ),
        (
            "unknown",
            "F(0,0)",
            "F(0,0) POST(1>0,0)",
            "POST(1>0,0) (at 1) is about an edge that does not exist; there are 0>1",
        ),
        ("store", " REDUCE(0)", "", "W(0,0) (at 6) leaks: put REDUCE(0) after it"),
        ("store", "W(0,0) REDUCE(0)", "REDUCE(0) W(0,0)", "W(0,0) (at 7) leaks: put REDUCE(0) after it"),
        (
            "store",
            "REDUCE(0)",
            "REDUCE(0) REDUCE(0)",
            "REDUCE(0) (at 8) has nothing to sum: remove it, or put it after a W",
        ),
    ],
)
def test_refuses_in_one_of_two_lists(rule: str, old: str, new: str, message: str) -> None:
    assert old in FIRST
    proof = pair(FIRST.replace(old, new, 1))
    assert f"rank 0: {message}" in [fault.message for fault in proof.faults if fault.rule == rule]


@pytest.mark.parametrize(
    ("rule", "old", "new", "message"),
    [
        ("store", "GATHER(0) F", "F", "F(0,0) (at 0) finds no parameters: put GATHER(0) before it"),
        ("store", "FREE(0) W", "W", "GATHER(0) (at 5) leaks: put FREE(0) after it"),
        (
            "store",
            "FREE(0) G",
            "G",
            "GATHER(0) (at 4) comes after GATHER(0) (at 0) with no FREE(0) between: put one in",
        ),
        (
            "store",
            "W(0,1)",
            "W(0,1) FREE(0)",
            "FREE(0) (at 11) frees what is not whole: remove it, or put GATHER(0)",
        ),
        (
            "store",
            "W(0,0)",
            "W(0,0) GATHER(0) FREE(0)",
            "FREE(0) (at 13) comes before any F or B read what GATHER(0)",
        ),
        (
            "missing",
            "IN(0,0) ",
            "",
            "IN(0,0) is missing; B(0,0) (at 8) starves: put it after OUT(0,0) (at 2) and",
        ),
        (
            "missing",
            "OUT(0,0) ",
            "",
            "OUT(0,0) is missing; IN(0,0) (at 7) starves: put it after F(0,0) (at 1) and",
        ),
        (
            "order",
            "F(0,0) OUT(0,0)",
            "OUT(0,0) F(0,0)",
            "F(0,0) (at 2) must come before OUT(0,0) (at 1), which takes",
        ),
        (
            "order",
            "IN(0,0) B(0,0)",
            "B(0,0) IN(0,0)",
            "IN(0,0) (at 9) must come before B(0,0) (at 8), which reads",
        ),
    ],
)
def test_refuses_in_a_lone_list(rule: str, old: str, new: str, message: str) -> None:
    assert not lone().faults
    assert old in LONE
    said = [fault.message for fault in lone(LONE.replace(old, new, 1)).faults if fault.rule == rule]
    assert any(words.startswith(f"rank 0: {message}") for words in said), said


def test_forward_passes_ascend() -> None:
    proof = prove(read(Graph.chain([0]), 2, "F(0,1) F(0,0) B(0,0) W(0,0) B(0,1) W(0,1) REDUCE(0) STEP"))
    assert one(proof, "order") == (
        "rank 0: F(0,0) (at 1) must come before F(0,1) (at 0), as forward passes of a stage ascend: move one "
        "past the other"
    )


def test_edges_inside_a_rank_are_handed_over() -> None:
    graph = Graph.chain([0, 0])
    text = "F(0,0) F(1,0) B(1,0) W(1,0) B(0,0) W(0,0) REDUCE(0) REDUCE(1) STEP"
    assert not prove(read(graph, 1, text)).faults
    swapped = prove(read(graph, 1, text.replace("F(0,0) F(1,0)", "F(1,0) F(0,0)")))
    assert "F(0,0) (at 1) must come before F(1,0) (at 0), which reads its result" in one(swapped, "order")
    posted = prove(read(graph, 1, text.replace("F(1,0)", "POST(0>1,0) F(1,0)")))
    assert "is not needed: both stages are on rank 0" in one(posted, "unknown")


def test_a_graph_that_cannot_be() -> None:
    lists = ("STEP", "STEP")
    assert "3 lists" in prove(read(PAIR, 1, *lists, "STEP")).text
    assert "0 microbatches" in prove(read(PAIR, 0, *lists)).text
    home = {"0": (0,), "1": (1,)}
    assert "there is no stage x" in prove(read(Graph(home, (Edge("0", "x"),)), 1, *lists)).text
    circle = Graph(home, (Edge("0", "1"), Edge("1", "0")))
    assert "edges lead in a circle" in prove(read(circle, 1, *lists)).text
    assert "edges lead in a circle" in prove(read(Graph(home, (Edge("0", "0"),)), 1, *lists)).text
    assert "is there twice" in prove(read(Graph(home, (Edge("0", "1"),) * 2), 1, *lists)).text


def two(first: str, second: str) -> Proof:
    """Two microbatches on two ranks; what must stand at the end of the lists is put there."""
    ends = (f"W({rank},0) W({rank},1) REDUCE({rank}) STEP" for rank in (0, 1))
    return prove(read(PAIR, 2, *(f"{text} {end}" for text, end in zip((first, second), ends, strict=True))))


def test_channel_in_another_order() -> None:
    first = (
        "F(0,0) POST(0>1,0) F(0,1) POST(0>1,1) WAIT(0>1,0) WAIT(0>1,1) "
        "POST(0<1,0) POST(0<1,1) WAIT(0<1,1) B(0,1) WAIT(0<1,0) B(0,0)"
    )
    second = (
        "POST(0>1,0) POST(0>1,1) WAIT(0>1,0) F(1,0) WAIT(0>1,1) F(1,1) "
        "B(1,1) POST(0<1,1) B(1,0) POST(0<1,0) WAIT(0<1,0) WAIT(0<1,1)"
    )
    proof = two(first, second)
    assert [fault.rule for fault in proof.faults] == ["channel"]
    assert one(proof, "channel") == (
        "rank 0: POST(0<1,0) (at 6) is transfer 0 of its channel, but on rank 1 that is POST(0<1,1) (at 7): "
        "post in the same order at both ends"
    )
    assert not two(first.replace("POST(0<1,0) POST(0<1,1)", "POST(0<1,1) POST(0<1,0)"), second).faults


def test_send_against_send() -> None:
    """The deadlock of 1F1B with blocking sends: each waits for its send before it posts its receive."""
    first = (
        "F(0,0) POST(0>1,0) WAIT(0>1,0) F(0,1) POST(0>1,1) WAIT(0>1,1) "
        "POST(0<1,0) WAIT(0<1,0) B(0,0) POST(0<1,1) WAIT(0<1,1) B(0,1)"
    )
    second = (
        "POST(0>1,0) WAIT(0>1,0) F(1,0) B(1,0) POST(0<1,0) WAIT(0<1,0) "
        "POST(0>1,1) WAIT(0>1,1) F(1,1) B(1,1) POST(0<1,1) WAIT(0<1,1)"
    )
    proof = two(first, second)
    assert one(proof, "deadlock").splitlines() == [
        "ranks wait for each other:",
        "  rank 0 WAIT(0>1,1) (at 5) waits for rank 1 POST(0>1,1) (at 6),",
        "      which comes after WAIT(0<1,0) (at 5)",
        "  rank 1 WAIT(0<1,0) (at 5) waits for rank 0 POST(0<1,0) (at 6),",
        "      which comes after WAIT(0>1,1) (at 5), the first of these",
        "  on rank 1, move POST(0>1,1) (at 6) before WAIT(0<1,0) (at 5)",
    ]
    moved = second.replace("WAIT(0<1,0) POST(0>1,1)", "POST(0>1,1) WAIT(0<1,0)")
    assert not two(first, moved).faults


def test_a_long_round_and_its_picture() -> None:
    """Each rank of a ring waits to send to the next before it posts what it gets from the one before."""
    graph, lists = compute("interleaved", 4, 2, 4)
    schedule = complete(graph, lists)
    stuck = []
    for rank, actions in enumerate(schedule.lists):
        blocking: list[Action] = []
        for made in actions:
            sends = made.op == "POST" and graph.home[made.target if made.back else made.unit] == (rank,)
            if made.op == "WAIT" and graph.home[made.target if made.back else made.unit] == (rank,):
                continue
            if made.op == "POST" and not sends:
                continue
            if made.op == "WAIT":
                blocking.append(made._replace(op="POST"))
            blocking.append(made)
            if sends:
                blocking.append(made._replace(op="WAIT"))
        stuck.append(tuple(blocking))
    bad = replace(schedule, lists=tuple(stuck))
    proof = prove(bad)
    assert {fault.rule for fault in proof.faults} == {"deadlock"}
    ranks = [each.wait.rank for each in proof.cycle]
    assert len(ranks) >= 2
    assert [each.post.rank for each in proof.cycle] == [*ranks[1:], ranks[0]]
    for each, after in zip(proof.cycle, [*proof.cycle[1:], proof.cycle[0]], strict=True):
        assert after.wait.at < each.post.at
    picture = svg(bad, proof.cycle)
    for each in proof.cycle:
        assert f"rank {each.wait.rank}<" in picture
        assert str(each.wait.action).replace(">", "&gt;").replace("<", "&lt;") in picture
    with pytest.raises(Wrong, match="all wait"):
        outcome(bad)


def test_no_more_than_a_few_are_said() -> None:
    proof = pair("STEP", "STEP")
    assert len(proof.faults) == 14
    assert proof.text.splitlines()[8:] == ["and 6 more"]


@pytest.mark.parametrize("each", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_mutants_are_refused_or_right(each: int) -> None:
    """So many mutants of each of 200 valid schedules: refused, or it ends and sums the right gradients."""
    rng = random.Random(each)
    verdicts: Counter[str] = Counter()
    for name, schedule in valid().items():
        right = oracle(schedule.graph, schedule.microbatches)
        for change, mutant in islice(mutants(schedule, rng), each):
            if prove(mutant).faults:
                continue
            verdicts[re.sub(r"\(.*", "", change.split(" ", 2)[2])] += 1
            try:
                assert outcome(mutant) == right, f"{name}: {change}"
            except Wrong as error:
                pytest.fail(f"{name}: {change}: {error}")
    accepted = {kind for kind in verdicts if not kind.startswith("swap")}
    assert accepted <= {"delete REDUCE", "duplicate REDUCE"}  # what one does not sum the next one does
    assert sum(verdicts.values()) > 10 * each  # else little was run


def test_large_lists_in_seconds() -> None:
    graph, lists = compute("1f1b", 16, 1, 128)
    schedule = complete(graph, lists)
    start = time.process_time()
    assert not prove(schedule).faults
    assert time.process_time() - start < 5
