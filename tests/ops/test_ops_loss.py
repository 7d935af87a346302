"""Chunked cross-entropy equals cross-entropy of full logits."""

import pytest
import torch

from weft.ops.cross_entropy import linear_cross_entropy, linear_nll


def inputs(tokens, embed=5, vocab=11, dtype=torch.float64):
    hidden, weight = torch.randn(tokens, embed, dtype=dtype), torch.randn(vocab, embed, dtype=dtype)
    targets = torch.randint(vocab, (tokens,))
    targets[:: max(2, tokens // 3)] = -1
    return hidden, weight, targets


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_equals_full(twins, tokens, chunk):
    hidden, weight, targets = inputs(tokens)
    twins(
        "cross_entropy",
        lambda h, w: linear_cross_entropy(h, w, targets, chunk, 0.37),
        [hidden, weight],
        1e-10,
    )
    twins("cross_entropy", lambda h: linear_cross_entropy(h, weight, targets, chunk), [hidden], 1e-10)
    twins("cross_entropy", lambda w: linear_cross_entropy(hidden, w, targets, chunk), [weight], 1e-10)


def test_all_targets_ignored():
    hidden, weight, _ = inputs(6)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, torch.full((6,), -1))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0


def test_nll():
    hidden, weight, targets = inputs(16)
    nll = linear_nll(hidden, weight, targets, chunk=5)
    want = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, ignore_index=-1, reduction="none")
    assert (nll - want).abs().max() <= 1e-10
    assert (linear_cross_entropy(hidden, weight, targets) - nll.sum()).abs() <= 1e-10


def test_fp32_and_far_logits(twins):
    """fp32 against fp32: 1e-5 of the largest element, with logits of hundreds."""
    hidden, weight, targets = inputs(32, dtype=torch.float32)
    twins("cross_entropy", lambda h, w: linear_cross_entropy(h, w, targets, 8), [hidden, weight], 1e-5)
    twins("cross_entropy", lambda h, w: linear_cross_entropy(h, w, targets, 8), [hidden * 100, weight], 1e-5)


def test_bf16_accumulates_wide():
    hidden, weight, targets = inputs(64, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, 8)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, [hidden, weight])
    assert all(g.dtype == torch.bfloat16 for g in grads)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = linear_cross_entropy(*wide, targets, 64)
    assert (loss - exact).abs() <= 1e-5 * exact
    for got, want in zip(grads, torch.autograd.grad(exact, wide), strict=True):
        assert (got - want).abs().max() <= 2**-8 * want.abs().max()


def test_gradcheck():
    hidden, weight, targets = inputs(6, embed=3, vocab=4)
    given = [hidden.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 4, 0.5), given, fast_mode=True
    )


def test_gradient_scales_with_the_cotangent():
    hidden, weight, targets = inputs(6)
    once, thrice = (
        torch.autograd.grad(f * linear_cross_entropy(hidden.requires_grad_(), weight, targets), hidden)[0]
        for f in (1.0, 3.0)
    )
    assert (thrice - 3 * once).abs().max() <= 1e-12
