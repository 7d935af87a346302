"""What a state before the first token adds: a scan from it is a scan from zero plus this."""

import pytest
import torch
from torch import Tensor

from weft.ops.scan import across, ssd
from weft.ops.segments import Segments


def inputs(tokens: int, groups: int = 2, dim: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """dt, A, C and the state, of 4 heads."""
    return [
        torch.rand(tokens, 4, dtype=dtype).add_(0.05),
        torch.rand(4, dtype=dtype).mul_(-3).sub_(0.1),
        torch.randn(tokens, groups, 5, dtype=dtype),
        torch.randn(4, dim, 5, dtype=dtype),
    ]


@pytest.mark.parametrize("tokens", [1, 7, 30])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_token_by_token(twins, tokens, groups):
    twins("scan", across, inputs(tokens, groups), 1e-12)


def test_no_tokens():
    leaves = [t.requires_grad_() for t in inputs(0)]
    y = across(*leaves)
    assert y.shape == (0, 4, 3)
    assert all(not g.any() for g in torch.autograd.grad(y.sum(), leaves))


def test_blocks_add_up(twins):
    twins("scan", across, inputs(23, dim=5000), 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_is_what_the_initial_state_adds(groups):
    dt, A, C, state = inputs(19, groups)
    x, B, D = (torch.randn(*s, dtype=torch.float64) for s in ((19, 4, 3), (19, groups, 5), (4,)))
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D, state)]
    segments = Segments((19,))
    want = ssd(*leaves[:6], segments, 4, initial=state.unsqueeze(0))
    got = ssd(*leaves[:6], segments, 4) + across(dt, A, C, state)
    cotangent = torch.randn_like(want)
    grads = (torch.autograd.grad(y, leaves, cotangent) for y in (want, got))
    for one, other in ((want, got), *zip(*grads, strict=True)):
        assert (one - other).abs().max() <= 1e-12 * max(1.0, one.abs().max().item())


def test_long_and_steep_runs_stay_finite_and_normal():
    """64K tokens in fp32, of decays from almost none to one that is gone at once."""
    tokens, rates = 2**16, [-1e-6, -1e-3, -1.0, -1e3]
    wide = [
        torch.rand(tokens, 4).add_(0.05),
        torch.tensor(rates),
        torch.randn(tokens, 1, 5),
        torch.randn(4, 3, 5),
    ]
    cotangent, results = torch.randn(tokens, 4, 3), []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in wide]
        y = across(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, cotangent.to(dtype))])
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all()
        small = got[got != 0].abs().min()
        assert small > 1e-36  # nothing subnormal: it is slow
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_low_precision_directions_give_wide_outputs():
    dt, A, C, state = inputs(9, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (dt, A, C.bfloat16(), state)]
    y = across(*leaves)
    assert y.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [t.dtype for t in leaves]
