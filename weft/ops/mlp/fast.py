"""Squared-ReLU MLP that keeps one inner activation instead of three, over blocks of rows in the cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.blocks import block_rows, blocks
from weft.ops.late import gradient, later, queued
from weft.ops.linear.fast import linear

BLOCK_NUMBERS = 2**19  # of the inner activation


def _blocks(x: Tensor, inner: int) -> Iterator[slice]:
    """Blocks of rows; one in low precision, where only one product adds up the weights' gradients in fp32."""
    exact = x.dtype in (torch.float32, torch.float64)
    return blocks(len(x), block_rows(x.device, inner, BLOCK_NUMBERS) if exact else max(1, len(x)))


def _grad_up(grad_inner: Tensor, x: Tensor) -> Tensor:
    total = x.new_zeros(grad_inner.shape[1], x.shape[1])
    for rows in _blocks(x, grad_inner.shape[1]):
        total.addmm_(grad_inner[rows].t(), x[rows])
    return total


def _grad_down(grad: Tensor, inner: Tensor) -> Tensor:
    total = grad.new_zeros(grad.shape[1], inner.shape[1])
    for rows in _blocks(grad, inner.shape[1]):
        total.addmm_(grad[rows].t(), inner[rows].square())
    return total


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inner, y = x.new_empty(len(x), len(up)), x.new_empty(len(x), len(down))
        for rows in _blocks(x, len(up)):
            own = torch.mm(x[rows], up.t(), out=inner[rows]).relu_()
            torch.mm(own.square(), down.t(), out=y[rows])
        ctx.weights = queued(up), queued(down)
        ctx.save_for_backward(x, up, down, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, up, down, inner = ctx.saved_tensors
        up_later, down_later = map(later, ctx.weights)
        need_x, need_up, need_down = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grad_up = torch.zeros_like(up) if need_up and not up_later else None
        grad_down = torch.zeros_like(down) if need_down and not down_later else None
        grad_inner = torch.empty_like(inner) if up_later else None
        for rows in _blocks(x, len(up)):
            own, own_grad = inner[rows], grad[rows]
            scratch = torch.empty_like(own) if grad_inner is None else grad_inner[rows]
            if grad_down is not None:
                grad_down.addmm_(own_grad.t(), torch.square(own, out=scratch))
            torch.mm(own_grad, down, out=scratch).mul_(own).mul_(2)
            if grad_up is not None:
                grad_up.addmm_(scratch.t(), x[rows])
            if grad_x is not None:
                torch.mm(scratch, up, out=grad_x[rows])
        if down_later:
            gradient(ctx.weights[1], _grad_down, grad, inner)
        if up_later:
            gradient(ctx.weights[0], _grad_up, grad_inner, x)
        return grad_x, grad_up, grad_down


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """See ``weft.ops.mlp.mlp``."""
    if torch.is_grad_enabled():
        return _MLP.apply(x, up, down)
    return linear(linear(x, up).relu_().square_(), down)
