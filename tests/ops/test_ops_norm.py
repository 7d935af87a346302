"""Hand-written norm gradients equal autograd's."""

import pytest
import torch

from weft.ops.mlp import mlp
from weft.ops.norm import gated_group_norm, rms_norm


def rms(x, weight):
    return rms_norm(x, weight, 1e-5)


def gated(y, z, weight):
    return gated_group_norm(y, z, weight, 4, 1e-5)


def inputs(count, tokens=10, width=12, dtype=torch.float64):
    return [*(torch.randn(tokens, width, dtype=dtype) for _ in range(count)), torch.randn(width, dtype=dtype)]


@pytest.mark.parametrize(("call", "count"), [(rms, 1), (gated, 2)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2**-6)]
)
def test_equals_reference(twins, call, count, dtype, tolerance):
    twins("norm", call, inputs(count, dtype=dtype), tolerance)


@pytest.mark.parametrize(("call", "count"), [(rms, 1), (gated, 2)])
def test_gradcheck(call, count):
    given = [t.requires_grad_() for t in inputs(count, tokens=3, width=8)]
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


def test_group_zero_is_one_group(twins):
    twins("norm", lambda y, z, w: gated_group_norm(y, z, w, 0, 1e-5), inputs(2), 1e-10)


def test_views_and_zero_rows(twins):
    y, z, weight = inputs(2)
    y[3] = 0.0
    twins("norm", gated, [y, z, weight], 1e-10)
    wide = torch.cat([y, z], dim=1)
    assert (gated(wide[:, :12], wide[:, 12:], weight) - gated(y, z, weight)).abs().max() <= 1e-14
    assert (rms(wide[:, :12], weight) - rms(y, weight)).abs().max() <= 1e-14


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_mlp(twins, dtype, tolerance):
    x, up, down = (torch.randn(shape, dtype=dtype) for shape in ((9, 4), (7, 4), (5, 7)))
    twins("mlp", mlp, [x, up, down], tolerance)
    with torch.no_grad():
        without = mlp(x, up, down)
    assert (without - mlp(x.requires_grad_(), up, down)).abs().max() <= 10 * tolerance


def test_mlp_gradcheck():
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4, 2), (3, 4))]
    assert torch.autograd.gradcheck(mlp, given, fast_mode=True)


def test_mlp_frozen_parts():
    x, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 4), (7, 4), (5, 7)))
    mlp(x, up.requires_grad_(), down).sum().backward()
    assert up.grad is not None
    assert x.grad is None
