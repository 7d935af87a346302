"""Rows written over others where they lie, without a second tensor of all rows."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Written(torch.autograd.Function):
    """The result has the memory of ``x``, whose old values nobody may need any more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        return x.detach().index_copy_(0, at, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (at,) = ctx.saved_tensors
        rows = grad.index_select(0, at) if ctx.needs_input_grad[1] else None
        return (grad.index_fill(0, at, 0.0) if ctx.needs_input_grad[0] else None), rows, None


def written(
    x: Float[Tensor, "all width"], rows: Float[Tensor, "some width"], at: Int64[Tensor, " some"]
) -> Float[Tensor, "all width"]:
    """``x`` with row ``at[i]`` replaced by ``rows[i]``, in the memory of ``x``; no place twice.

    As ``x.index_copy(0, at, rows)``, which is its slow twin. What made ``x`` must not have kept it.
    """
    return _Written.apply(x, rows, at)
