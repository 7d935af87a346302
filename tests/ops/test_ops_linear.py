"""Few tokens without gradient equal the plain product, in every row count and shape."""

import pytest
import torch

from weft.ops.linear import linear


@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 64, 65])
@pytest.mark.parametrize("rows", [1, 6, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_few_tokens(twins, tokens, rows, dtype, tolerance):
    x, weight = torch.randn(tokens, 5, dtype=dtype), torch.randn(rows, 5, dtype=dtype)
    wide = torch.cat([x, x], dim=1)[:, :5]  # a view with a longer stride
    twins("linear", linear, [x, weight], tolerance)
    with torch.no_grad():
        assert torch.allclose(linear(wide, weight), x @ weight.t(), rtol=0, atol=tolerance)


def test_bf16_is_within_its_rounding():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    with torch.no_grad():
        assert (linear(x, weight).float() - x.float() @ weight.float().t()).abs().max() < 0.1
