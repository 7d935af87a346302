"""Products of each expert written in place of one buffer; experts without rows cost nothing."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        inner = x.new_empty(x.shape[0], up.shape[1])
        for e, rows in _slices(counts):
            torch.mm(x[rows], up[e].t(), out=inner[rows])
        inner.relu_()
        weighted = inner.square().mul_(weights.unsqueeze(1))
        y = torch.empty_like(x)
        for e, rows in _slices(counts):
            torch.mm(weighted[rows], down[e].t(), out=y[rows])
        ctx.counts = counts
        ctx.save_for_backward(x, up, down, weights, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, up, down, weights, inner = ctx.saved_tensors
        grad = grad.contiguous()
        grad_up, grad_down = torch.zeros_like(up), torch.zeros_like(down)
        squared = inner.square()
        weighted = squared * weights.unsqueeze(1)
        grad_inner, grad_x = torch.empty_like(inner), torch.empty_like(x)
        for e, rows in _slices(ctx.counts):
            torch.mm(grad[rows], down[e], out=grad_inner[rows])
            torch.mm(grad[rows].t(), weighted[rows], out=grad_down[e])
        grad_weights = (grad_inner * squared).sum(-1)
        grad_inner.mul_(inner).mul_(2 * weights.unsqueeze(1))
        for e, rows in _slices(ctx.counts):
            torch.mm(grad_inner[rows], up[e], out=grad_x[rows])
            torch.mm(grad_inner[rows].t(), x[rows], out=grad_up[e])
        return grad_x, grad_up, grad_down, grad_weights.to(weights.dtype), None


def expert_mlp(x: Tensor, up: Tensor, down: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """See ``weft.ops.experts.expert_mlp``."""
    return _Experts.apply(x.contiguous(), up, down, weights, counts)
