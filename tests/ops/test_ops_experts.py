"""Experts over sorted rows equal a loop over experts."""

import pytest
import torch

from weft.ops.experts import expert_mlp


def inputs(rows, experts=5, width=6, inner=7, dtype=torch.float64):
    return [
        torch.randn(rows, width, dtype=dtype),
        torch.randn(experts, inner, width, dtype=dtype),
        torch.randn(experts, width, inner, dtype=dtype),
        torch.rand(rows, dtype=dtype),
    ]


@pytest.mark.parametrize(
    "counts", [(4, 0, 3, 1, 2), (9, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0), (200, 30, 1, 0, 60)]
)
def test_equals_loop(twins, counts):
    def call(x, up, down, weights):
        return expert_mlp(x, up, down, counts, weights)

    twins("experts", call, inputs(sum(counts)), 1e-10)


def test_counts_may_be_a_tensor():
    x, up, down, weights = inputs(6)
    counts = torch.tensor([1, 0, 2, 0, 3])
    assert torch.equal(
        expert_mlp(x, up, down, counts, weights), expert_mlp(x, up, down, [1, 0, 2, 0, 3], weights)
    )


@pytest.mark.parametrize("counts", [(1, 0, 1, 1, 1), (5, 0, 3, 0, 0)])
def test_without_gradient_equals_with(counts):
    x, up, down, weights = inputs(sum(counts))
    want = expert_mlp(x.requires_grad_(), up, down, counts, weights)
    with torch.no_grad():
        assert (expert_mlp(x, up, down, counts, weights) - want).abs().max() <= 1e-12


def test_fp32(twins):
    """fp32 against fp32: 1e-5 of the largest element."""
    counts = (40, 0, 30, 20, 6)
    twins("experts", lambda x, u, d, w: expert_mlp(x, u, d, counts, w), inputs(96, dtype=torch.float32), 1e-5)


def test_gradcheck():
    given = [t.requires_grad_() for t in inputs(5, experts=3, width=2, inner=3)]
    assert torch.autograd.gradcheck(
        lambda x, u, d, w: expert_mlp(x, u, d, (2, 0, 3), w), given, fast_mode=True
    )


def test_expanded_gradient():
    """The cotangent of a plain sum has stride 0."""
    x, up, down, weights = inputs(6)
    expert_mlp(x.requires_grad_(), up, down, (1, 0, 2, 0, 3), weights).sum().backward()
    want = torch.autograd.grad(
        (expert_mlp(x, up, down, (1, 0, 2, 0, 3), weights) * torch.ones(6, 6)).sum(), x
    )[0]
    assert torch.equal(x.grad, want)
