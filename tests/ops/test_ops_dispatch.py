"""Rows in expert order and back: transposes of each other, summed in slot order."""

import pytest
import torch

from weft.ops.dispatch import collect, spread


def tables(tokens, slots, experts=5):
    order = torch.argsort(torch.randint(experts, (tokens * slots,)), stable=True)
    return order, torch.argsort(order).view(tokens, slots)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_and_back(tokens, dtype):
    order, back = tables(tokens, 3)
    x = torch.randn(tokens, 4).to(dtype)
    rows = spread(x, order, back)
    assert torch.equal(rows, x.repeat_interleave(3, 0)[order])
    assert torch.allclose(collect(rows, order, back), 3 * x, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)


def test_transposes():
    """``<spread(x), r> == <x, collect(r)>``, forward and backward."""
    order, back = tables(6, 2)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    assert abs((spread(x, order, back) * rows).sum() - (x * collect(rows, order, back)).sum()) < 1e-12
    assert torch.autograd.gradcheck(lambda t: spread(t, order, back), x)
    assert torch.autograd.gradcheck(lambda t: collect(t, order, back), rows)
