"""Simulated schedules against closed formulas, against times found by recursion, and by hand."""

import json
import random
import time
from functools import cache

import pytest

from weft.plan.pipelines import SPLIT, compute
from weft.plan.placing import complete
from weft.plan.prove import prove
from weft.plan.schedule import COMPUTE, Graph, Schedule, action
from weft.plan.simulate import bubble_formula, simulate
from weft.plan.timeline import Timeline, merged

KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zbv", 2)]


def pipeline(kind, ranks, virtual, microbatches, **settings):
    graph, lists = compute(kind, ranks, virtual, microbatches)
    return complete(graph, lists, split=kind in SPLIT, **settings)


def listed(graph, microbatches, *lines):
    return Schedule(graph, microbatches, tuple(tuple(map(action, line.split())) for line in lines))


def equal(done):
    return 1.0 if done.op in COMPUTE else 0.0


def times(line):
    return {(span.rank, str(span.action)): (span.start, span.end) for span in line.spans}


@pytest.mark.parametrize(("kind", "virtual"), KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_bubble_formulas(kind, virtual, ranks):
    for microbatches in (1, ranks, 2 * ranks - 1, 2 * ranks + 1, 4 * ranks):
        schedule = pipeline(kind, ranks, virtual, microbatches)
        line = simulate(schedule, equal)
        expected = bubble_formula(kind, ranks, virtual, microbatches)
        if expected is not None:
            assert line.bubble_share == pytest.approx(expected, abs=1e-9)
        else:  # never better than the least possible
            least = (ranks - 1) / (3 * virtual * microbatches + ranks - 1)
            assert line.bubble_share > least - 1e-9
        assert tuple(line.peaks().values()) == prove(schedule).live


def test_bubble_formula_by_hand():
    assert bubble_formula("gpipe", 4, 1, 8) == pytest.approx(3 / 11)
    assert bubble_formula("interleaved", 4, 2, 8) == pytest.approx(3 / 19)
    assert bubble_formula("interleaved", 4, 2, 7) is None
    assert bubble_formula("zbv", 4, 2, 8) == pytest.approx(3 / 51)
    assert bubble_formula("file", 4, 1, 8) is None


def twin(schedule, cost, transfer):
    """End of every action of a rank by recursion; channels are links."""
    lists = schedule.lists
    where = {(rank, done): place for rank, row in enumerate(lists) for place, done in enumerate(row)}
    homes = schedule.graph.home

    @cache
    def over(post):  # of a transfer
        ends = {*homes[post.unit], *homes[post.target]}
        rank = min(ends)
        channel = [p for p in lists[rank] if p.op == "POST" and p[1:2] + p[3:] == post[1:2] + post[3:]]
        before = channel[: channel.index(post)]
        begins = [end(each, where[each, post]) for each in ends]
        return max(*begins, over(before[-1]) if before else 0.0) + transfer(post)

    @cache
    def end(rank, place):
        done, now = lists[rank][place], end(rank, place - 1) if place else 0.0
        if done.op == "WAIT":
            return max(now, over(done._replace(op="POST")))
        if done.op == "STEP":
            return max(end(each, len(row) - 2) for each, row in enumerate(lists)) + cost(done)
        return now + cost(done) if done.op in COMPUTE else now

    return {(rank, str(done)): end(rank, place) for (rank, done), place in where.items() if done.op != "POST"}


@pytest.mark.parametrize(("kind", "virtual"), KINDS)
def test_times_are_those_of_the_recursion(kind, virtual):
    draw = random.Random(f"{kind}{virtual}")
    schedule = pipeline(kind, 3, virtual, 7)
    cost = cache(lambda done: draw.random() if done.op != "REDUCE" else 0.0)
    transfer = cache(lambda post: draw.random())
    line = simulate(schedule, cost, transfer)
    found, apart = times(line), twin(schedule, cost, transfer)
    for (rank, text), end in apart.items():
        done = action(text)
        joined = done.op == "B" and found[rank, text.replace("B", "W", 1)][0] == found[rank, text][1]
        if not joined and done.op != "REDUCE":  # of a joined pass, its W has the end
            assert found[rank, text][1] == pytest.approx(end)
    assert {(span.rank, span.action) for span in line.spans} == {
        (rank, done) for rank, row in enumerate(schedule.lists) for done in row
    }


def test_b_right_before_its_w_is_one_pass():
    line = simulate(listed(Graph.chain([0]), 1, "F(0,0) B(0,0) W(0,0) STEP"), lambda done: 2.0)
    assert times(line)[0, "B(0,0)"] == (2, 6)
    assert times(line)[0, "W(0,0)"] == (6, 6)
    assert line.makespan == 8
    assert line.busy == {0: 6}
    assert line.bubble_share == 0.25


def test_store_and_host_streams():
    seconds = {"F": 1.0, "B": 1.0, "W": 1.0, "GATHER": 3.0, "REDUCE": 4.0, "OUT": 2.0, "IN": 5.0, "STEP": 1.0}
    text = "GATHER(0) F(0,0) OUT(0,0) IN(0,0) F(0,1) B(0,1) B(0,0) FREE(0) W(0,0) W(0,1) REDUCE(0) STEP"
    line = simulate(listed(Graph.chain([0]), 2, text), lambda done: seconds[done.op])
    found = times(line)
    assert found[0, "F(0,0)"] == (3, 4)  # after the GATHER
    assert found[0, "OUT(0,0)"] == (4, 6)
    assert found[0, "F(0,1)"] == (4, 5)  # beside it
    assert found[0, "IN(0,0)"] == (6, 11)  # after it
    assert found[0, "B(0,1)"] == (5, 6)
    assert found[0, "B(0,0)"] == (11, 12)
    assert found[0, "REDUCE(0)"] == (14, 18)
    assert found[0, "STEP"] == (18, 19)
    assert line.live()[0][-1].value == 0
    assert line.peaks() == {0: 2}
    assert line.peaks(lambda stage: 10.0) == {0: 20}


def test_transfers_share_a_link_in_the_order_they_become_ready():
    edges = [action(f"POST(a>{target},0)").edge for target in "bc"]
    graph = Graph({"a": (0,), "b": (1,), "c": (2,)}, tuple(edges))
    lines = (
        "F(a,0) POST(a>b,0) POST(a>c,0) WAIT(a>b,0) WAIT(a>c,0) STEP",
        "W(b,0) POST(a>b,0) WAIT(a>b,0) F(b,0) STEP",  # is late, so that c goes first
        "POST(a>c,0) WAIT(a>c,0) F(c,0) STEP",
    )
    schedule = listed(graph, 1, *lines)
    cost = {action("F(a,0)"): 1.0, action("W(b,0)"): 2.0}

    def run(**link):
        line = simulate(schedule, lambda done: cost.get(done, 0.0), lambda post: 5.0, **link)
        return [times(line)[0, f"POST(a>{target},0)"] for target in "bc"]

    assert run() == [(2, 7), (1, 6)]
    assert run(link=lambda post: graph.home[post.unit]) == [(6, 11), (1, 6)]


def test_says_what_each_rank_waits_for():
    graph = Graph.chain([0, 1])
    stuck = listed(graph, 1, "F(0,0) WAIT(0<1,0) POST(0>1,0) STEP", "POST(0>1,0) WAIT(0>1,0) F(1,0) STEP")
    with pytest.raises(ValueError, match=r"rank 0 waits in WAIT\(0<1,0\), which rank 0 and rank 1 has not"):
        simulate(stuck, equal)
    with pytest.raises(ValueError, match=r"rank 1 waits in WAIT\(0>1,0\), which rank 0 has not posted"):
        simulate(stuck, equal)
    with pytest.raises(ValueError, match="rank 1 waits in STEP, which not all ranks reach"):
        simulate(listed(graph, 1, "F(0,0)", "STEP"), equal)
    crossed = listed(graph, 2, "POST(0>1,0) POST(0>1,1) STEP", "POST(0>1,1) POST(0>1,0) STEP")
    with pytest.raises(ValueError, match=r"rank 1 has POST\(0>1,1\) where rank 0 has POST\(0>1,0\)"):
        simulate(crossed, equal)


def test_rows_survive_json_and_ranks_merge():
    line = simulate(pipeline("zbv", 3, 2, 6, resident=6), lambda done: 0.1, lambda post: 0.01)
    assert Timeline.from_rows(json.loads(json.dumps(line.as_rows()))) == line
    parts = [Timeline(tuple(span for span in line.spans if span.rank == rank)) for rank in line.ranks]
    assert merged(parts) == line
    clocks = [part.shifted(1000.0 * rank) for rank, part in enumerate(parts)]
    again = merged(clocks, meet=True)
    assert again.makespan == pytest.approx(line.makespan)
    assert [span.start for span in again.spans] == pytest.approx([span.start for span in line.spans])


def test_large_schedules_are_quick():
    schedule = pipeline("1f1b", 16, 1, 64)
    start = time.process_time()  # checks of annotations cost most of it here
    line = simulate(schedule, equal)
    assert time.process_time() - start < 5
    assert line.bubble_share == pytest.approx(15 / (64 + 15))
