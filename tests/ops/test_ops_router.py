"""Routing, its losses and limited capacity."""

import pytest
import torch

from weft.ops.mix import mix, uniform
from weft.ops.router import (
    choice_frequency,
    choice_share,
    count_choices,
    document_balance,
    fits,
    route,
    tally,
    z_loss,
)
from weft.ops.router.capacity import capacity, group, importance, pack, unpack
from weft.ops.segments import Segments


def balance(scores, experts, segments, coef):
    """The balance loss of all documents, from its parts."""
    ids, lengths = segments.ids(scores.device), torch.tensor(segments.lengths, dtype=scores.dtype)
    chosen = count_choices(experts, ids, len(lengths), scores.shape[1])
    return document_balance(scores, ids, coef * choice_frequency(chosen, lengths, experts.shape[1]))


def inputs(tokens=14, experts=8, dtype=torch.float64):
    return torch.randn(tokens, experts, dtype=dtype), torch.randn(experts, dtype=dtype).mul_(0.2)


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (2, 1), (8, 8), (8, 4)])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_reference(twins, groups, top_groups, normalize):
    logits, bias = inputs()

    def call(x):
        return route(x, bias, 2, (groups, top_groups), normalize, 2.5)

    twins("router", call, [logits], 1e-10)


def test_weights_are_unbiased_and_choices_biased():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, experts, scores = route(logits, torch.tensor([0.0, 0.0, 0.0, 10.0]), 2, scale=3.0)
    assert set(experts[0].tolist()) == {0, 3}
    want = scores.gather(1, experts) / scores.gather(1, experts).sum() * 3
    assert (weights - want).abs().max() < 1e-6
    assert (weights.sum() - 3).abs() < 1e-6


def test_group_limit():
    """Groups rank by their two best experts, not by the best one."""
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0]])
    _, experts, _ = route(logits, torch.zeros(4), 2, groups=(2, 1))
    assert set(experts[0].tolist()) == {2, 3}


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_group_limit_holds_whatever_the_bias(shift):
    """Where all biased scores of the best groups are negative, too, no expert of another group is chosen."""
    logits, bias = inputs(tokens=50)
    bias += shift
    weights, experts, scores = route(logits, bias, 3, groups=(4, 2))
    for t in range(50):
        ranking = scores[t] + bias
        sums = [ranking[2 * g : 2 * g + 2].sum().item() for g in range(4)]
        best = sorted(range(4), key=lambda g: -sums[g])[:2]
        members = sorted((2 * g + i for g in best for i in (0, 1)), key=lambda e: -ranking[e].item())
        assert experts[t].tolist() == members[:3]
        assert (weights[t] - scores[t, experts[t]] / scores[t, experts[t]].sum()).abs().max() < 1e-12


def test_forced_choices_with_holes(twins):
    logits, bias = inputs()
    choices = torch.stack([torch.randperm(8)[:3] for _ in range(14)])
    choices[::3, 1] = -1
    choices[4] = -1
    twins("router", lambda x: route(x, bias, 3, choices=choices, holes=True), [logits], 1e-10)
    weights = route(logits, bias, 3, choices=choices, holes=True)[0]
    assert (weights[choices < 0] == 0).all()
    sums = weights.sum(-1)
    assert (sums[[*range(4), *range(5, 14)]] - 1).abs().max() < 1e-12
    assert sums[4] == 0


def test_forced_choices(twins):
    logits, bias = inputs()
    choices = torch.stack([torch.randperm(8)[:3] for _ in range(14)])
    twins("router", lambda x: route(x, bias, 3, choices=choices), [logits], 1e-10)
    assert torch.equal(route(logits, bias, 3, choices=choices)[1], choices)


@pytest.mark.parametrize("lengths", [(14,), (5, 9), (7, 7), (1, 0, 13)])
def test_balance(twins, lengths):
    logits, bias = inputs()
    experts = route(logits, bias, 3)[1]
    segments = Segments(lengths)
    twins("router", lambda x: balance(x.sigmoid(), experts, segments, 0.7), [logits], 1e-10)


def test_balance_of_documents_adds_up():
    logits, bias = inputs()
    _, experts, scores = route(logits, bias, 3)
    both = balance(scores, experts, Segments((5, 9)), 0.7)
    apart = [balance(scores[a:b], experts[a:b], Segments((b - a,)), 0.7) for a, b in ((0, 5), (5, 14))]
    assert (both - sum(apart)).abs() < 1e-12


def test_balance_of_even_load_is_coef_per_token():
    """f = P * E = 1 for every expert when load and scores are even."""
    scores = torch.full((8, 4), 0.5, dtype=torch.float64)
    experts = torch.arange(8).remainder(4).unsqueeze(1)
    assert (balance(scores, experts, Segments((8,)), 0.25) - 8 * 0.25).abs() < 1e-12


def test_gradcheck():
    logits, bias = inputs(tokens=4, experts=4)
    segments = Segments((3, 1))
    experts = route(logits, bias, 2)[1]

    def call(x):
        weights, _, scores = route(x, bias, 2, choices=experts)
        return weights, balance(scores, experts, segments, 1.0), z_loss(x)

    assert torch.autograd.gradcheck(call, logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("groups", [(14,), (5, 9), (3, 0, 1, 10), ()])
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_fits(twins, groups, limit):
    tokens = sum(groups)
    experts = torch.stack([torch.randperm(4)[:3] for _ in range(tokens)] or [torch.zeros(0)]).long()
    experts = experts.view(tokens, 3)
    experts[::5, 2] = -1
    ranking = torch.randint(0, 4, (tokens, 3)) * ((1 << 24) - 1) // 3  # many are equal

    def call(ranks, chosen, leaf):
        limits = [limit + g for g in range(len(groups))]
        return fits(ranks, chosen, groups, limits).long(), leaf * 1

    twins("router", call, [ranking, experts, torch.ones(1)], 0)


def test_capacity_by_hand():
    """The factor is the decimal number: 1.1 * 100 is not a little more than 110."""
    assert [capacity(n, 1.0, 2, 8) for n in (1, 4, 5, 16)] == [1, 1, 2, 4]
    assert capacity(400, 1.1, 2, 8) == 110
    assert capacity(400, 1e-9, 2, 8) == 1


def test_groups_and_what_ranks_share():
    """Windows of 5 and 7 tokens in groups of 4; this rank has tokens 3 to 8 of 12, another 9 to 11."""
    parts = (range(3), range(3, 9), range(9, 9), range(9, 12))
    assert group((5, 7), 4, parts[1], parts) == ((4, 1, 4, 3), (1, 1, 4, 0), (4,), ((0, 3, 1),))
    assert group((5, 7), 4, parts[1]) == ((4, 1, 4, 3), (1, 1, 4, 0), (4, 1, 4, 3), ((0, 3, 6),))
    assert group((5, 0, 7), 0, parts[3], parts) == ((5, 7), (0, 3), (5, 7), ((0, 9, 3),))
    assert group((), 4, range(0), ()) == ((), (), (), ())


def test_importance_orders_like_weights_and_survives_packing():
    weights = torch.rand(500, 3, dtype=torch.float64) * 2.5
    ranking = importance(weights)
    assert ranking.max() < 1 << 24
    order = weights.flatten().argsort()
    assert (ranking.flatten()[order].diff() >= 0).all()
    assert len(ranking.unique()) > 1400
    assert torch.equal(importance(weights * (1 + 1e-15)), ranking)
    experts = torch.randint(-1, 8, (500, 3))
    for got, want in zip(unpack(pack(ranking, experts)), (ranking, experts), strict=True):
        assert torch.equal(got, want)
    assert unpack(torch.zeros(1, 1, dtype=torch.int64))[1] == -1


def test_tally_is_a_count_without_negative_numbers():
    places = torch.randint(-1, 5, (7, 3))
    assert tally(places, 6).tolist() == [(places == i).sum().item() for i in range(6)]
    assert tally(places[:0], 2).tolist() == [0, 0]


def test_share_of_choices():
    assert choice_share(torch.tensor([3, 1, 0, 0]), torch.float64).tolist() == [3, 1, 0, 0]
    assert choice_share(torch.zeros(2, dtype=torch.int64), torch.float64).tolist() == [0, 0]


def test_scores_that_are_all_zero_cost_nothing():
    """A sigmoid of very negative logits is 0 for every expert; fp32 knows no square of 1e-20."""
    logits = torch.full((2, 4), -1e4, requires_grad=True)
    weights, experts, scores = route(logits, torch.zeros(4), 2)
    loss = balance(scores, experts, Segments((2,)), 1.0) + weights.sum()
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_a_token_without_any_expert_has_no_gradient():
    logits = torch.randn(2, 4, requires_grad=True)
    choices = torch.tensor([[-1, -1], [0, 3]])
    route(logits, torch.zeros(4), 2, choices=choices, holes=True)[0].square().sum().backward()
    assert (logits.grad[0] == 0).all()
    assert logits.grad[1].isfinite().all()


def test_mix_is_splitmix64():
    """The first numbers that splitmix64 gives from seed 0, as published with it."""
    step = 0x9E3779B97F4A7C15
    states = torch.tensor([(n * step + (1 << 63)) % (1 << 64) - (1 << 63) for n in (1, 2, 3)])
    want = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % (1 << 64) for value in mix(states).tolist()] == want


def test_uniform_fills_its_interval():
    numbers = uniform("a", torch.arange(300), torch.arange(100))
    counts = torch.histc(numbers, 10, 0, 1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (counts - 3000).abs().max() < 4 * 55  # standard deviation of a bin: 52
    assert torch.equal(numbers[7:9, 3:5], uniform("a", torch.arange(7, 9), torch.arange(3, 5)))
    assert not torch.equal(numbers, uniform("b", torch.arange(300), torch.arange(100)))
