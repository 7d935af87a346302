"""Squared-ReLU MLP that keeps one inner activation instead of three."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.ops.linear.fast import linear


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inner = F.linear(x, up).relu_()
        ctx.save_for_backward(x, up, down, inner)
        return F.linear(inner.square(), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, up, down, inner = ctx.saved_tensors
        need_x, need_up, need_down = ctx.needs_input_grad
        grad_down = grad.t() @ inner.square() if need_down else None
        grad_inner = (grad @ down).mul_(inner).mul_(2)
        grad_up = grad_inner.t() @ x if need_up else None
        return grad_inner @ up if need_x else None, grad_up, grad_down


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """See ``weft.ops.mlp.mlp``."""
    if torch.is_grad_enabled():
        return _MLP.apply(x, up, down)
    return linear(linear(x, up).relu_().square_(), down)
