"""Models cut into stages: no cut is more even, head and MTP depths counted; and what is refused."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from tests.tiny import CONFIG
from weft.plan.pipelines import compute
from weft.plan.stages import cut, even
from weft.recipes.registry import RECIPES
from weft.spec.count import training_flops_per_token


def by_force(costs: list[float], extra: list[float]) -> float:
    """The least cost of the largest run, over all cuts."""
    count, stages = len(costs), len(extra)
    best = float("inf")
    for inner in combinations(range(1, count + 1), stages - 1):
        runs = list(pairwise((0, *inner, count)))
        if all(start < stop for start, stop in runs[:-1]):
            loads = (sum(costs[a:b]) + more for (a, b), more in zip(runs, extra, strict=True))
            best = min(best, max(loads))
    return best


def test_no_cut_is_more_even() -> None:
    rng = random.Random(1)
    for _ in range(300):
        stages = rng.randint(1, 4)
        costs = [rng.choice([1.0, 2.0, 5.0, rng.random()]) for _ in range(rng.randint(stages, 8))]
        extra = [rng.choice([0.0, 3.0]) * (i == stages - 1 or rng.random() < 0.3) for i in range(stages)]
        sizes = even(costs, extra)
        ends = list(pairwise([sum(sizes[:i]) for i in range(stages + 1)]))
        largest = max(sum(costs[a:b]) + more for (a, b), more in zip(ends, extra, strict=True))
        assert largest == pytest.approx(by_force(costs, extra))
        assert sum(sizes) == len(costs)
        assert all(sizes[:-1])


@pytest.mark.parametrize("home", [(0,), (0, 1), (0, 1, 2), (0, 1, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_have_every_unit_once_but_the_token_table(home: tuple[int, ...], tied: bool) -> None:
    model = replace(CONFIG, tie_word_embeddings=tied)
    made = cut(model, home)
    for spec in model.params():
        stages = [i for i, piece in enumerate(made.pieces) if piece.has(spec.name)]
        table = spec.name == "embed.weight" and len(home) > 1
        assert stages == ([0, len(home) - 1] if table else stages[:1])
        assert made.ranks_of(spec.name) == tuple(sorted({home[i] for i in stages}))
    total = sum(cost.total for cost in made.costs)
    assert total == pytest.approx(training_flops_per_token(model, 2048.0))


def test_the_table_is_only_where_it_is_read() -> None:
    model = replace(CONFIG, pattern="ME*-", mtp_num_depths=0)
    assert cut(model, (0, 1)).ranks_of("embed.weight") == (0,)
    assert cut(replace(model, tie_word_embeddings=True), (0, 1)).ranks_of("embed.weight") == (0, 1)


def test_head_and_depths_leave_their_rank_fewer_layers() -> None:
    """Also in the other stages of that rank: ranks are even where stages are not."""
    model = RECIPES["nemotron3_super_pretrain"]().model
    for kind, virtual in (("1f1b", 1), ("interleaved", 2), ("zbv", 2)):
        home = tuple(seat for (seat,) in compute(kind, 4, virtual, 1)[0].home.values())
        made = cut(model, home)
        loads = [
            sum(c.total for c, rank in zip(made.costs, home, strict=True) if rank == r) for r in range(4)
        ]
        layers = [sum(len(piece.layers) for piece in made.at(rank)) for rank in range(4)]
        assert layers[home[-1]] < min(n for rank, n in enumerate(layers) if rank != home[-1])
        assert max(loads) < 1.2 * sum(loads) / 4


@pytest.mark.parametrize(
    ("home", "layers", "message"),
    [
        ((0, 1), (1, 2), "3 layers in 2 stages, but the model has 4"),
        ((0, 1), (1, 1, 2), "4 layers in 3 stages"),
        ((0, 1, 2), (2, 0, 2), "stage 1 of 3 would have no layer"),
        ((0, 1, 2, 3, 4, 5), (), "4 layers cannot be cut into 6 stages"),
    ],
)
def test_what_cannot_be_cut_is_refused(home: tuple[int, ...], layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(CONFIG, home, layers)


def test_first_and_last_stage_may_be_the_table_and_the_head_alone() -> None:
    made = cut(CONFIG, (0, 1, 2), (0, 4, 0))
    assert [len(piece.layers) for piece in made.pieces] == [0, 4, 0]
    assert (made.pieces[0].first, made.pieces[2].last) == (True, True)
