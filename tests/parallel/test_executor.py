"""The executor on small networks: what it computes, in which order, and what is left when a rank fails."""

import json
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gangs import Gangs, threads
from tests.parallel import nets
from tests.parallel.graphs import any_schedule
from tests.plan import looms
from tests.plan.mutants import valid
from weft.parallel.comm import Comm
from weft.parallel.executor import Executor
from weft.plan.pipelines import KINDS, SPLIT, compute
from weft.plan.placing import complete, forward_only
from weft.plan.prove import prove
from weft.plan.schedule import Action, Edge, Graph, Schedule, action

ROOT = Path(__file__).parents[2]
STAGE = {"level": 3, "gather": "stage", "lookahead": 2}
TIMEOUT = 10.0  # seconds until a rank that waits for another counts as hanging
VIRTUAL = {"interleaved": 2, "zbv": 2}


def of_kind(kind: str, ranks: int, microbatches: int, virtual: int = 0, **form: Any) -> Schedule:
    graph, lists = compute(kind, ranks, virtual or VIRTUAL.get(kind, 1), microbatches)
    return complete(graph, lists, split=kind in SPLIT, **form)


def wrong(schedule: Schedule) -> list[str]:
    """How a step on threads differs from the oracle."""
    results = threads(len(schedule.lists), lambda comm: nets.step(schedule, comm), timeout=TIMEOUT)
    return nets.faults(results, schedule.graph, schedule.microbatches)


# A vision tower in two stages and an audio tower feed a decoder in two stages; the second of these reads the
# end of the first tower too, past the first. The decoder ends where the vision tower begins.
TOWERS = Graph(
    {"eye": (0,), "brow": (1,), "ear": (2,), "low": (1,), "high": (0,)},
    tuple(
        Edge(*e)
        for e in (("eye", "brow"), ("brow", "low"), ("ear", "low"), ("low", "high"), ("brow", "high"))
    ),
)
ON_TOWERS = (
    "F(eye,0) F(eye,1) F(high,0) B(high,0) F(eye,2) F(high,1) B(high,1) W(high,0) B(eye,0) W(eye,0) "
    "F(high,2) W(high,1) B(high,2) B(eye,1) W(high,2) W(eye,1) B(eye,2) W(eye,2)",
    "F(brow,0) F(low,0) F(brow,1) F(low,1) B(low,0) W(low,0) B(brow,0) F(brow,2) F(low,2) B(low,1) "
    "B(brow,1) W(brow,0) W(low,1) B(low,2) W(brow,1) B(brow,2) W(low,2) W(brow,2)",
    "F(ear,0) F(ear,1) B(ear,0) W(ear,0) F(ear,2) B(ear,1) B(ear,2) W(ear,1) W(ear,2)",
)


def towers(**form: Any) -> Schedule:
    return complete(TOWERS, tuple(tuple(map(action, line.split())) for line in ON_TOWERS), **form)


@pytest.mark.parametrize("form", [{}, {"resident": 3}, STAGE], ids=str)
def test_towers_with_several_inputs_and_outputs(form: dict[str, Any]) -> None:
    schedule = towers(**form)
    assert not prove(schedule).faults, prove(schedule).text
    assert not wrong(schedule)


def swept(sort: str, first: int, count: int) -> dict[str, int]:
    """Counts of what ran without a fault (see ``sweep_lists``)."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.parallel.sweep_lists",
        sort,
        str(first),
        str(count),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    print(sort, done.stdout)  # noqa: T201 - shown by pytest -s
    return json.loads(done.stdout)


def test_valid_lists() -> None:
    assert swept("valid", 0, 3)["list ran"] > 70


SEATS = [pytest.param(first, 200, marks=pytest.mark.slow) for first in range(100, 900, 200)]


@pytest.mark.parametrize(("first", "count"), [(0, 60), *SEATS])
@pytest.mark.parametrize("sort", ["seats", "woven"])
def test_seats_groups_frozen_routed_and_joined(sort: str, first: int, count: int) -> None:
    """Any order of any graph that has all of these; encoders woven into the lists of a decoder."""
    assert swept(sort, first, count)["list ran"] > 0.8 * count


@pytest.mark.parametrize(("first", "count"), [(0, 12), pytest.param(50, 200, marks=pytest.mark.slow)])
def test_mutants_of_woven_lists(first: int, count: int) -> None:
    verdicts = swept("torn", first, count)
    assert sum(verdicts.values()) == 3 * count
    assert verdicts["swap ran"] > 0.1 * count


def test_evaluation_with_encoders() -> None:
    """Without gradients, group by group; the loss is that of the oracle."""
    for seed in range(6):
        graph = looms.drawn(random.Random(seed)).loom.graph
        schedule = forward_only(graph, 5)

        def run(comm: Comm, schedule: Schedule = schedule) -> tuple[float, int, list[str]]:
            net = nets.Net(schedule, comm)
            made = nets.executor(schedule, net)
            with torch.no_grad():
                made.run()
            return net.loss, made.peak, nets.left_over(made)

        results = threads(graph.seats, run, timeout=TIMEOUT)
        assert sum(loss for loss, *_ in results) == pytest.approx(nets.oracle(graph, 5)[0], rel=1e-12)
        assert [rest for _, *rest in results] == [[0, []]] * graph.seats


def test_microbatches_without_rows() -> None:
    """Nothing to encode: empty tensors travel through the same lists."""
    made = looms.drawn(random.Random(8))
    schedule = made.schedule("lead")

    def run(comm: Comm) -> tuple[float, dict[str, torch.Tensor], list[str]]:
        net = nets.Net(schedule, comm, rows=lambda stage, i: 0 if i else nets.rows(stage, i))
        executor = nets.executor(schedule, net)
        executor.run()
        return net.loss, net.gradients, nets.left_over(executor)

    assert schedule.microbatches > 1
    results = threads(len(schedule.lists), run, timeout=TIMEOUT)
    assert not nets.faults(results, schedule.graph, 1)


SLOW = [pytest.param(first, 200, marks=pytest.mark.slow) for first in range(100, 2100, 200)]


@pytest.mark.parametrize(("first", "count"), [(0, 100), *SLOW])
def test_any_order_of_any_graph(first: int, count: int) -> None:
    assert swept("any", first, count)["list ran"] > 0.8 * count


def job(comm: Comm, name: str) -> list[Any]:
    """On processes: loss and gradients as JSON."""
    loss, gradients, left = nets.step(GLOO[name](), comm)
    return [loss, {key: value.tolist() for key, value in gradients.items()}, left]


GLOO = {
    "any": lambda: any_schedule(50),
    "towers": lambda: towers(resident=3),
    "zbv": lambda: of_kind("zbv", 3, 6, resident=5),
    "interleaved": lambda: of_kind("interleaved", 3, 5, level=3, gather="stage"),
    "seats": lambda: any_schedule(17, simple=False),
    "woven": lambda: looms.drawn(random.Random(5)).schedule("bubble"),
}


@pytest.mark.parametrize("name", GLOO)
def test_processes(processes: Gangs, name: str) -> None:
    schedule = GLOO[name]()
    assert 1 < len(schedule.lists) <= 4
    answers = processes(len(schedule.lists)).run("tests.parallel.test_executor:job", {"name": name})
    results = [
        (loss, {key: torch.tensor(value, dtype=torch.float64) for key, value in gradients.items()}, left)
        for loss, gradients, left in answers
    ]
    assert not nets.faults(results, schedule.graph, schedule.microbatches)


def visible(actions: tuple[Action, ...]) -> list[int]:
    """Places of what a work is told: not what goes out and in, and of the sums of a stage only the last."""
    last = {made: at for at, made in enumerate(actions)}
    return [
        at
        for at, made in enumerate(actions)
        if made.op not in ("OUT", "IN") and (made.op != "REDUCE" or last[made] == at)
    ]


def ordered(schedule: Schedule) -> None:
    """What ranks do, and their spans, are in the order of the lists, and the times agree."""

    def run(comm: Comm) -> None:
        net = nets.Net(schedule, comm)
        made, marks = nets.executor(schedule, net), list[float]()
        made._clock.mark = lambda: marks.append(time.perf_counter()) or marks[-1]
        spans, actions = made.run(), schedule.lists[comm.rank]
        assert [span.action for span in spans] == list(actions)
        assert [marks[0] + span.end for span in spans] == pytest.approx(marks[1:])
        assert {span.rank for span in spans} == {comm.rank}
        assert all(one.start <= one.end == two.start for one, two in pairwise(spans))
        assert [done for done, _ in net.done] == [actions[at] for at in visible(actions)]
        for (done, moment), at in zip(net.done, visible(actions), strict=True):
            whole = done.op == "W" and actions[at - 1] == done._replace(op="B")  # is over within B
            assert marks[at - whole] <= moment <= marks[at + 1], done

    threads(len(schedule.lists), run, timeout=TIMEOUT)


@pytest.mark.parametrize("kind", [*KINDS, "towers"])
@pytest.mark.parametrize("form", [{}, STAGE, {"resident": 5}], ids=str)
def test_executed_order_is_the_listed_order(kind: str, form: dict[str, Any]) -> None:
    if kind == "towers":
        ordered(towers(**form))
        return
    for ranks, microbatches in ((1, 2), (2, 4), (4, 6)):
        ordered(of_kind(kind, ranks, microbatches, **form))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 13))])
def test_mutants_that_pass_the_checker_give_the_right_gradients(seed: int) -> None:
    """One action of each of more than 200 lists deleted, doubled, swapped: none hangs, none is wrong."""
    verdicts = swept("mutants", seed, 1)
    assert len(valid()) >= 200
    assert sum(verdicts.values()) == 3 * len(valid())
    assert verdicts["swap ran"] > 50


def test_a_fault_frees_the_others_and_leaves_nothing() -> None:
    """Wherever a rank fails, the others do not hang, and the same executors then run a step as if new."""
    schedule = of_kind("zbv", 3, 5, resident=5)
    rng = random.Random(1)
    for _ in range(5):
        rank = rng.randrange(3)
        failing = rng.choice([schedule.lists[rank][at] for at in visible(schedule.lists[rank])])
        works: dict[int, tuple[nets.Net, Executor]] = {}

        def fail(comm: Comm, rank: int = rank, failing: Action = failing, works: dict = works) -> None:
            net = nets.Net(schedule, comm)
            net.fails = failing if comm.rank == rank else None
            works[comm.rank] = net, nets.executor(schedule, net)
            works[comm.rank][1].run()

        with pytest.raises(ArithmeticError, match=rf"rank {rank} fails at {failing.op}"):
            threads(3, fail, timeout=TIMEOUT)
        assert not any(nets.left_over(made) for _, made in works.values())

        def again(comm: Comm, works: dict = works) -> Any:
            net, made = works[comm.rank]
            net.fails = None
            net.join(comm)
            net.begin()
            made.run()
            return net.loss, net.gradients, nets.left_over(made)

        assert not nets.faults(threads(3, again, timeout=TIMEOUT), schedule.graph, 5), failing


def test_forward_only() -> None:
    """Without gradients nothing is kept, and the loss is that of the oracle."""
    graph, _ = compute("interleaved", 3, 2, 5)
    for form in ({}, {"level": 3, "gather": "stage"}):
        schedule = forward_only(graph, 5, **form)

        def run(comm: Comm, schedule: Schedule = schedule) -> tuple[float, int, list[str]]:
            net = nets.Net(schedule, comm)
            made = nets.executor(schedule, net)
            with torch.no_grad():
                made.run()
            assert all(p.grad is None for stage in net.stages.values() for p in stage.parameters())
            return net.loss, made.peak, nets.left_over(made)

        results = threads(3, run, timeout=TIMEOUT)
        assert sum(loss for loss, *_ in results) == pytest.approx(nets.oracle(graph, 5)[0], rel=1e-12)
        assert [rest for _, *rest in results] == [[0, []]] * 3


def test_steps_follow_each_other() -> None:
    """An executor runs its list again and again; every step is the same to the bit."""
    schedule = of_kind("zero_bubble", 2, 4, virtual=2, resident=4)

    def run(comm: Comm) -> list[dict[str, torch.Tensor]]:
        net, results = nets.Net(schedule, comm), []
        made = nets.executor(schedule, net)
        for _ in range(3):
            net.begin()
            made.run()
            results.append(net.gradients)
        return results

    for first, *others in threads(2, run, timeout=TIMEOUT):
        for other in others:
            assert all(torch.equal(first[name], other[name]) for name in first)
