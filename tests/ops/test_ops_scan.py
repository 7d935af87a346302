"""The chunked scan equals the recurrence."""

import pytest
import torch
from torch import Tensor

from weft.ops.scan import ssd, ssd_step
from weft.ops.segments import Segments

RAGGED = [
    ((8, 8), 4),
    ((7, 3, 5, 1, 12), 4),
    ((9,), 4),
    ((4, 4, 1, 1, 1, 16), 4),
    ((2, 0, 6), 4),
    ((5,), 1),
    ((5, 5), 64),
]


def inputs(
    tokens: int,
    segments: int,
    heads: int = 4,
    dim: int = 3,
    groups: int = 2,
    state: int = 5,
    dtype=torch.float64,
) -> list[Tensor]:
    return [
        torch.randn(tokens, heads, dim, dtype=dtype),
        torch.rand(tokens, heads, dtype=dtype).add_(0.05),
        torch.rand(heads, dtype=dtype).mul_(-3).sub_(0.1),
        torch.randn(tokens, groups, state, dtype=dtype),
        torch.randn(tokens, groups, state, dtype=dtype),
        torch.randn(heads, dtype=dtype),
        torch.randn(segments, heads, dim, state, dtype=dtype),
    ]


@pytest.mark.parametrize(("lengths", "chunk"), RAGGED)
@pytest.mark.parametrize("with_initial", [True, False])
def test_equals_recurrence(twins, lengths, chunk, with_initial):
    segments = Segments(lengths)

    def call(*t):
        initial = t[6] if with_initial else None
        return ssd(*t[:6], segments, chunk, initial, return_final=True)

    given = inputs(segments.tokens, len(lengths))
    twins("scan", call, given if with_initial else given[:6], 1e-10)


def test_final_state_alone_carries_gradient():
    segments = Segments((6, 3))
    given = inputs(9, 2)
    leaves = [t.requires_grad_() for t in given]
    _, final = ssd(*leaves[:6], segments, 4, leaves[6], return_final=True)
    grads = torch.autograd.grad(final.sum(), leaves)
    assert grads[4].abs().max() == 0  # C does not reach the final state
    assert grads[6].abs().min() > 0


@pytest.mark.parametrize("groups", [1, 4])
def test_fp32(twins, groups):
    """fp32 against fp32: 2e-5 of the largest element at 96 tokens."""
    segments = Segments((64, 32))
    twins(
        "scan",
        lambda *t: ssd(*t[:6], segments, 16, t[6], return_final=True),
        inputs(96, 2, groups=groups, dtype=torch.float32),
        2e-5,
    )


def test_gradcheck():
    segments = Segments((5, 3))
    given = [t.requires_grad_() for t in inputs(8, 2, heads=2, dim=2, groups=1, state=2)]
    call = lambda *t: ssd(*t[:6], segments, 2, t[6], return_final=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


def test_bf16_keeps_states_wide():
    x, dt, A, B, C, D, initial = inputs(12, 2, dtype=torch.float32)
    low = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D, initial]
    leaves = [t.requires_grad_() for t in low]
    segments = Segments((7, 5))
    y, final = ssd(*leaves[:6], segments, 4, initial=leaves[6], return_final=True)
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    grads = torch.autograd.grad([y.float().sum(), final.sum()], leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    wide = [t.detach().double() for t in low]
    want, want_final = ssd(*wide[:6], segments, 4, initial=wide[6], return_final=True)
    assert (y - want).abs().max() <= 2**-7 * want.abs().max()
    assert (final - want_final).abs().max() <= 1e-5 * want_final.abs().max()


def test_huge_decay_does_not_overflow():
    x, dt, A, B, C, D, _ = inputs(32, 1, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, dt * 100, A * 100, B, C, D)]
    y = ssd(*leaves, Segments((32,)), 16)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(t.isfinite().all() for t in (y, *grads))


def test_input_may_be_views():
    """Strided inputs, as split from one projection, give the same bits."""
    x, dt, A, B, C, D, _ = inputs(16, 1)
    wide = torch.cat([x.flatten(1), B.flatten(1), C.flatten(1)], dim=1)
    vx, vB, vC = wide.split([12, 10, 10], dim=1)
    views = vx.unflatten(1, (4, 3)), dt, A, vB.unflatten(1, (2, 5)), vC.unflatten(1, (2, 5)), D
    assert torch.equal(ssd(*views, Segments((16,)), 4), ssd(x, dt, A, B, C, D, Segments((16,)), 4))


def test_step_equals_scan():
    x, dt, A, B, C, D, initial = inputs(18, 3)
    want, want_final = ssd(x, dt, A, B, C, D, Segments((6, 6, 6)), 4, initial, return_final=True)
    state, got = initial.clone(), []
    by_step = [t.view(3, 6, *t.shape[1:]) for t in (x, dt, B, C)]
    for t in range(6):
        xs, dts, Bs, Cs = (s[:, t] for s in by_step)
        got.append(ssd_step(state, xs, dts, A, Bs, Cs, D))
    assert (torch.stack(got, 1).flatten(0, 1) - want).abs().max() <= 1e-10
    assert (state - want_final).abs().max() <= 1e-10
