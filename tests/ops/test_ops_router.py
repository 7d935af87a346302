"""Routing and its losses."""

import pytest
import torch

from weft.ops.router import choice_frequency, count_choices, document_balance, route, z_loss
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
        return route(x, bias, 2, groups, top_groups, normalize, 2.5)

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
    _, experts, _ = route(logits, torch.zeros(4), 2, groups=2, top_groups=1)
    assert set(experts[0].tolist()) == {2, 3}


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
