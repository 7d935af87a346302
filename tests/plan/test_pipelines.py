"""Compute lists equal torch's where torch has them, and are valid everywhere."""

from itertools import product
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from tests.plan.schedules import makespan, run
from weft.config.errors import ConfigError
from weft.plan.pipelines import KINDS, compute, graph_of, parse_lists, peak
from weft.plan.schedule import Action, Graph

SIZES = list(product(range(1, 9), range(1, 5), [*range(1, 10), 12, 16, 17, 20]))
FEW = list(product((1, 2, 3, 5, 8), (1, 2, 3), (1, 2, 5, 8, 9, 13)))


def theirs(kind, ranks, virtual, microbatches):
    """torch's order as words, F, I for gradients of inputs, W, and B for both."""
    fake = SimpleNamespace(
        _num_stages=ranks,
        num_stages=ranks * virtual,
        _n_microbatches=microbatches,
        pp_group_size=ranks,
        n_local_stages=virtual,
        microbatches_per_round=microbatches // max(1, microbatches // ranks),
    )
    schedule = {
        "gpipe": torch_schedules.ScheduleGPipe,
        "1f1b": torch_schedules.Schedule1F1B,
        "interleaved": torch_schedules.ScheduleInterleaved1F1B,
        "zbv": torch_schedules.ScheduleZBVZeroBubble,
    }[kind]
    if kind in ("gpipe", "1f1b"):
        lists = schedule._get_pipeline_order(fake)
    else:
        lists = {rank: schedule._calculate_single_rank_operations(fake, rank) for rank in range(ranks)}
    if kind == "1f1b":  # torch's numbers of forward passes start at 1 where no forward pass is ahead
        lists[ranks - 1] = [
            each._replace(microbatch_index=each.microbatch_index - 1)
            if each is not None and each.computation_type.value == "F"
            else each
            for each in lists[ranks - 1]
        ]
    names = {"F": "F", "I": "B", "W": "W", "B": "BW"}
    return tuple(
        tuple(
            Action(op, str(each.stage_index), each.microbatch_index)
            for each in lists[rank]
            if each is not None and each.computation_type.value in names
            for op in names[each.computation_type.value]
        )
        for rank in range(ranks)
    )


def torch_has(kind, ranks, virtual, microbatches):
    if kind in ("gpipe", "1f1b"):
        return virtual == 1 and (kind == "gpipe" or microbatches >= ranks)
    if kind == "zbv":
        return virtual == 2
    return microbatches % max(1, microbatches // ranks) == 0


@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "interleaved", "zbv"])
def test_equals_torch(kind):
    sizes = [size for size in SIZES if torch_has(kind, *size)]
    assert len(sizes) > 60
    for size in sizes:
        assert compute(kind, *size)[1] == theirs(kind, *size), size


def sizes_of(kind):
    only = {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(kind)
    return [size for size in (FEW if only is None else SIZES) if only in (None, size[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_every_size_runs_once_through(kind):
    for ranks, virtual, microbatches in sizes_of(kind):
        graph, lists = compute(kind, ranks, virtual, microbatches)
        every = {Action(op, stage, i) for op in "FBW" for stage in graph.home for i in range(microbatches)}
        done = run(graph, lists)
        assert len(done) == sum(map(len, lists)) == len(every), (ranks, virtual, microbatches)
        assert set(done) == every
        assert all(graph.home[each.unit] == (rank,) for rank, actions in enumerate(lists) for each in actions)


def test_interleaved_of_rounds_that_do_not_divide():
    sizes = [size for size in SIZES if not torch_has("interleaved", *size) and size[1] > 1]
    assert len(sizes) > 20
    for ranks, virtual, microbatches in sizes:
        graph, lists = compute("interleaved", ranks, virtual, microbatches)
        longest = -(-microbatches // max(1, microbatches // ranks))
        for rank, actions in enumerate(lists):
            assert peak(actions) <= (virtual - 1) * longest + 2 * (ranks - 1 - rank) + 1
        assert makespan(graph, lists) <= 3 * virtual * microbatches + 3 * (ranks - 1) * virtual


COSTS = [(1, 1, 1), (1, 2, 1), (1, 1, 3), (2, 1, 0.2), (1, 1.3, 0.7), (1, 0, 1)]


@pytest.mark.parametrize("virtual", [1, 2, 3])
def test_zero_bubble_is_never_worse(virtual):
    for ranks, microbatches, costs, uneven in product((1, 2, 3, 6), (1, 3, 8), COSTS, (0, 1)):
        op_cost = dict(zip("FBW", costs, strict=True))

        def cost(done, op_cost=op_cost, uneven=uneven):
            return op_cost[done.op] * (1 + uneven * (int(done.unit) * 7 % 5) / 4)

        kind = "1f1b" if virtual == 1 else "interleaved"
        graph, before = compute(kind, ranks, virtual, microbatches)
        _, after = compute("zero_bubble", ranks, virtual, microbatches, cost)
        assert makespan(graph, after, cost) <= makespan(graph, before, cost, whole=True) + 1e-9
        assert max(map(peak, after)) <= max(map(peak, before))


def test_zero_bubble_reaches_the_formula():
    for ranks, factor, virtual in product((1, 2, 3, 4, 6, 8), (1, 3), (1, 2)):
        graph, lists = compute("zero_bubble", ranks, virtual, ranks * factor)
        assert makespan(graph, lists) <= 3 * virtual * ranks * factor + ranks - 1
        if virtual == 1:  # of arXiv 2401.10241, where W is cheaper than B

            def cost(done):
                return {"F": 1.0, "B": 1.2, "W": 0.8}[done.op]

            graph, lists = compute("zero_bubble", ranks, virtual, ranks * factor, cost)
            bubble = makespan(graph, lists, cost) - 3 * ranks * factor
            assert bubble <= (ranks - 1) * (1 + 1.2 - 0.8) + 1e-9


@pytest.mark.parametrize(
    ("kind", "ranks", "virtual", "microbatches", "words"),
    [
        ("1f1b", 2, 2, 4, "set virtual = 1"),
        ("zbv", 2, 1, 4, "set virtual = 2"),
        ("2f2b", 2, 1, 4, "use one of gpipe"),
        ("gpipe", 2, 1, 0, "at least 1"),
    ],
)
def test_refuses(kind, ranks, virtual, microbatches, words):
    with pytest.raises(ValueError, match=words):
        compute(kind, ranks, virtual, microbatches)


def test_lists_from_text():
    graph, lists = compute("zbv", 3, 2, 4)
    text = "# a V\n\n" + "".join(" ".join(map(str, actions)) + "  # a rank\n" for actions in lists)
    assert parse_lists(text, "v.txt") == lists
    assert graph_of(lists) == graph
    with pytest.raises(ConfigError, match=r"(?s)v.txt, line 2: 'X\(0,1\)' is not .* line 3: 'F\(0\)' is not"):
        parse_lists("F(0,0)\nF(1,0) X(0,1)\nF(0)", "v.txt")
    with pytest.raises(ConfigError, match="has no actions"):
        parse_lists("# nothing\n", "v.txt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("F(0,0) F(1,0)\nF(1,1)", "stage 1 has forward passes on pipeline ranks 0 and 1"),
        ("F(0,0)\nB(0,0)", "rank 1 has no F"),
        ("F(0,0)\nF(2,0)", "1 has no F"),
    ],
)
def test_no_graph(text, words):
    with pytest.raises(ValueError, match=words):
        graph_of(parse_lists(text, "lists"))


def test_graph_of_ranks_in_any_order():
    assert graph_of(parse_lists("F(1,0) F(0,0)\nF(2,0)", "lists")) == Graph.chain([0, 0, 1])
