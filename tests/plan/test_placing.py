"""What is placed around compute lists: no deadlock, no wait of a sender, bounds that are kept."""

from itertools import product

import pytest

from tests.plan.schedules import follow, live_peak, run
from weft.plan.pipelines import KINDS, SPLIT, compute, parse_lists, peak
from weft.plan.placing import complete, forward_only
from weft.plan.prove import prove
from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Schedule


def cases(ranks=(1, 2, 3, 5), virtual=(1, 2, 3), microbatches=(1, 4, 7)):
    for kind, *size in product(KINDS, ranks, virtual, microbatches):
        if {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(kind, size[1]) == size[1]:
            yield kind, *compute(kind, *size)


def check(schedule, **limits):
    left, wrong = follow(schedule)
    assert not left, left
    assert not wrong, wrong
    proof = prove(schedule, **limits)
    assert not proof.faults, proof.text
    return proof


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_every_kind_and_size_is_proved(lookahead):
    for kind, graph, lists in cases() if lookahead == 1 else cases((1, 3), (1, 2), (1, 4)):
        schedule = complete(graph, lists, lookahead=lookahead, split=kind in SPLIT)
        proof = check(schedule)
        assert proof.live == tuple(map(peak, lists))
        assert tuple(tuple(a for a in each if a.op in COMPUTE) for each in schedule.lists) == lists
        assert [each[-1] for each in schedule.lists] == [Action("STEP")] * len(lists)


def test_senders_wait_only_for_what_is_over():
    """Without any of their waits lists run to the same end; each wait finds the receiver's wait behind it."""
    for kind, graph, lists in cases((2, 3), (1, 2), (2, 5)):
        schedule = complete(graph, lists, split=kind in SPLIT)
        over = {(action, rank) for rank, action in walk(schedule)}
        for rank, actions in enumerate(schedule.lists):
            last = max(index for index, action in enumerate(actions) if action.op in COMPUTE)
            for index, action in enumerate(actions[:last]):
                if action.op == "WAIT" and rank == sender(graph, action):
                    assert (action, rank) in over, (kind, action)
                    behind = {a for _, a in before(graph, schedule, rank, index)}
                    use = Action("B", action.unit, action.microbatch) if action.back else None
                    use = use or Action("F", action.target, action.microbatch)
                    assert use in behind, (kind, str(action))


def sender(graph, action):
    return graph.home[action.target if action.back else action.unit][0]


def walk(schedule):
    return [(rank, action) for rank, actions in enumerate(schedule.lists) for action in actions]


def before(graph, schedule, rank, index):
    """Computations that must be over when this place of a list is reached, by computations alone."""
    todo = [(rank, action) for action in schedule.lists[rank][:index] if action.op in COMPUTE]
    seen = set()
    place = {action: at for at, action in walk(schedule) if action.op in COMPUTE}
    index_of = {
        action: at for actions in schedule.lists for at, action in enumerate(actions) if action.op in COMPUTE
    }
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        action = here[1]
        needs = [Action("F", e.source, action.microbatch) for e in graph.edges if e.target == action.unit]
        if action.op == "B":
            needs = [Action("B", e.target, action.microbatch) for e in graph.edges if e.source == action.unit]
        for need in needs if action.op != "W" else ():
            other = place[need]
            todo += [(other, a) for a in schedule.lists[other][: index_of[need] + 1] if a.op in COMPUTE]
    return seen


def test_unsplit_passes_stay_together():
    graph, lists = compute("1f1b", 3, 1, 6)
    for actions in complete(graph, lists, resident=2).lists:
        after = dict(zip(actions, actions[1:], strict=False))
        assert all(after[a].op == "W" for a in actions if a.op == "B")
    apart = complete(graph, lists, split=True)
    for actions in apart.lists[1:]:
        after = dict(zip(actions, actions[1:], strict=False))
        assert all(after[a].op == "POST" and after[a].back for a in actions if a.op == "B")
    assert "B(0,0) W(0,0)" in apart.text


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_stages_are_whole_where_they_are_used(level):
    for kind, graph, lists in cases(ranks=(1, 3), virtual=(1, 2), microbatches=(1, 5)):
        schedule = complete(graph, lists, level=level, gather="stage", split=kind in SPLIT)
        check(schedule)
        for rank, actions in enumerate(schedule.lists):
            whole = dict.fromkeys(graph.at(rank), False)
            fresh = dict.fromkeys(graph.at(rank), 0)
            for action in actions:
                if action.op in ("GATHER", "FREE"):
                    assert level == 3
                    assert whole[action.unit] == (action.op == "FREE")
                    whole[action.unit] = action.op == "GATHER"
                elif action.op in ("F", "B"):
                    assert whole[action.unit] == (level == 3)
                elif action.op == "W":
                    fresh[action.unit] += 1
                elif action.op == "REDUCE":
                    assert fresh[action.unit] == (1 if level >= 2 else len(lists[rank]) // 3 // len(whole))
                    fresh[action.unit] = 0
            assert not any(whole.values())
            assert not any(fresh.values())


def test_gathers_are_few():
    graph, lists = compute("interleaved", 4, 2, 16)
    schedule = complete(graph, lists, level=3, gather="stage")
    count = [sum(a.op == "GATHER" for a in actions) for actions in schedule.lists]
    assert all(2 <= each <= 12 for each in count), count  # of 64 uses
    graph, lists = compute("1f1b", 4, 1, 16)
    assert complete(graph, lists, level=3, gather="stage").text.count("GATHER") == 4


def test_offload_keeps_the_bound():
    moved = 0
    for kind, graph, lists in cases(ranks=(2, 4), virtual=(1, 2), microbatches=(1, 7)):
        most = max(map(peak, lists))
        least = 1 if kind not in SPLIT else least_of(graph, lists, most)
        for resident in sorted({least, (least + most) // 2, most}):
            schedule = complete(graph, lists, resident=resident, split=kind in SPLIT)
            assert max(check(schedule, most_live=resident).live) <= resident
            assert max(map(live_peak, schedule.lists)) <= resident
            moved += schedule.text.count("OUT")
            for rank, actions in enumerate(schedule.lists):
                if peak(lists[rank]) <= resident:
                    assert all(a.op != "OUT" for a in actions)
    assert moved > 50


def least_of(graph, lists, most):
    """Smallest bound that is not refused, as its message says."""
    for resident in range(1, most):
        try:
            complete(graph, lists, resident=resident)
            return resident
        except ValueError as error:
            message = str(error)
        assert resident < int(message.rpartition(" ")[2]) <= most, message
    return most


def test_what_is_needed_last_goes_out():
    graph, lists = compute("gpipe", 1, 1, 4)
    assert complete(graph, lists, resident=2).text == (
        "F(0,0) F(0,1) OUT(0,1) F(0,2) OUT(0,2) F(0,3) B(0,0) W(0,0) IN(0,1) B(0,1) W(0,1) "
        "IN(0,2) B(0,2) W(0,2) B(0,3) W(0,3) REDUCE(0) STEP\n"
    )


def test_complete_lists_are_taken_as_they_are():
    graph, lists = compute("1f1b", 2, 1, 3)
    made = complete(graph, lists)
    assert complete(graph, parse_lists(made.text, "file"), resident=1, level=3) == made
    some = complete(graph, tuple(each[:-1] for each in made.lists))
    assert "STEP is missing" in prove(some).text


def test_a_graph_that_is_no_chain():
    """An encoder beside the first stage, a skip from it to the last, two stages of a rank side by side."""
    home = {"0": (0,), "1": (1,), "2": (1,), "3": (0,), "4": (2,)}
    edges = (Edge("0", "2"), Edge("1", "2"), Edge("2", "3"), Edge("0", "4"), Edge("3", "4"), Edge("1", "4"))
    graph = Graph(home, edges)
    count = 6
    lists = tuple(
        tuple(Action(op, stage, i) for i in range(count) for op, stage in order)
        for order in (
            [("F", "0"), ("F", "3"), ("B", "3"), ("B", "0"), ("W", "0"), ("W", "3")],
            [("F", "1"), ("F", "2"), ("B", "2"), ("W", "2"), ("B", "1"), ("W", "1")],
            [("F", "4"), ("B", "4"), ("W", "4")],
        )
    )
    assert len(run(graph, lists)) == 3 * 5 * count
    check(complete(graph, lists))
    check(complete(graph, lists, split=True, level=3, gather="stage", resident=2))
    for lookahead in (0, 1, 5):
        left, wrong = follow(forward_only(graph, 11, lookahead=lookahead))
        assert not left
        assert not wrong


def test_launches_have_the_order_of_the_sender():
    """The gradients come in another order than they are used in."""
    graph = Graph.chain([0, 1])
    lists = parse_lists(
        "F(0,0) F(0,1) F(0,2) B(0,0) W(0,0) B(0,1) W(0,1) B(0,2) W(0,2)\n"
        "F(1,0) F(1,1) F(1,2) B(1,2) W(1,2) B(1,1) W(1,1) B(1,0) W(1,0)",
        "file",
    )
    check(complete(graph, lists))


def test_a_deadlock_is_completed_and_then_refused():
    graph = Graph.chain([0, 1, 0])
    text = "F(2,0) F(0,0) B(2,0) W(2,0) B(0,0) W(0,0)\nF(1,0) B(1,0) W(1,0)"
    schedule = complete(graph, parse_lists(text, "file"))
    assert follow(schedule)[0]
    assert prove(schedule).cycle


def test_lists_that_lack_something_are_refused():
    graph, lists = compute("interleaved", 2, 2, 3)
    for rank, actions in enumerate(lists):
        for index in range(len(actions)):
            less = (*actions[:index], *actions[index + 1 :])
            schedule = complete(graph, tuple(less if r == rank else each for r, each in enumerate(lists)))
            assert prove(schedule).faults


def test_forward_only():
    sizes = [("1f1b", r, 1) for r in range(1, 6)] + [("zbv", r, 2) for r in range(1, 4)]
    sizes += [("interleaved", ranks, virtual) for ranks in (2, 3, 4) for virtual in (2, 3)]
    for (kind, ranks, virtual), microbatches, lookahead in product(sizes, (1, 7, 15), (0, 1, 4)):
        graph, _ = compute(kind, ranks, virtual, 1)
        schedule = forward_only(graph, microbatches, level=3, gather="stage", lookahead=lookahead)
        left, wrong = follow(schedule)
        assert not left
        assert not wrong
        every = {Action("F", stage, i) for stage in graph.home for i in range(microbatches)}
        assert {a for each in schedule.lists for a in each if a.op in COMPUTE} == every
        assert not {a.op for each in schedule.lists for a in each} - {"F", "POST", "WAIT", "GATHER", "FREE"}
        for rank, actions in enumerate(schedule.lists):
            assert sends_open(graph, rank, actions) <= 3 * ranks * virtual


def sends_open(graph: Graph, rank: int, actions: tuple[Action, ...]) -> int:
    open_, most = 0, 0
    for action in actions:
        if action.target and sender(graph, action) == rank:
            open_ += 1 if action.op == "POST" else -1
        most = max(most, open_)
    assert open_ == 0
    return most


def test_few_transfers_are_open():
    """A sender of 1f1b never holds more than a few results."""
    graph, lists = compute("1f1b", 4, 1, 40)
    schedule: Schedule = complete(graph, lists)
    assert all(sends_open(graph, rank, actions) <= 5 for rank, actions in enumerate(schedule.lists))
