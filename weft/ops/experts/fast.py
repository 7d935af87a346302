"""One expert at a time, all of its work while its rows are in the cache; experts without rows cost nothing.

Measured (two threads, fp32, 32 experts of 128 x 256, ms for one of the two products): a loop of ``mm`` and
``grouped_mm`` tie at 16384 rows (8.3); with few rows the loop wins at 4 (0.036 against 0.048) and
``grouped_mm`` at 32 (0.19 against 0.26). Gathered weights and ``bmm`` take three times as long or more.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.ops.late import gradient, later, queued
from weft.ops.linear.fast import linear

GROUPED_ROWS = range(16, 257)  # rows for which one grouped call beats a loop, without gradient


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _total(counts: list[int], left: Tensor, right: Tensor) -> Tensor:
    """A place for the gradient of each expert's matrix; zeros for experts without rows."""
    total = left.new_empty(len(counts), left.shape[1], right.shape[1])
    for e in (e for e, count in enumerate(counts) if not count):
        total[e] = 0.0
    return total


def _grad_up(grad_inner: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    total = _total(counts, grad_inner, x)
    for e, rows in _slices(counts):
        torch.mm(grad_inner[rows].t(), x[rows], out=total[e])
    return total


def _grad_down(grad: Tensor, inner: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    total, factor = _total(counts, grad, inner), weights.unsqueeze(1)
    for e, rows in _slices(counts):
        own = inner[rows]
        torch.mm(grad[rows].t(), (own * own).mul_(factor[rows]), out=total[e])
    return total


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        inner = x.new_empty(x.shape[0], up.shape[1])
        y, factor = x.new_empty(x.shape), weights.unsqueeze(1)
        for e, rows in _slices(counts):
            own = inner[rows]
            torch.mm(x[rows], up[e].t(), out=own).relu_()
            torch.mm((own * own).mul_(factor[rows]), down[e].t(), out=y[rows])
        ctx.weights, ctx.counts = (queued(up), queued(down)), counts
        ctx.save_for_backward(x, up, down, weights, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, None]:
        x, up, down, weights, inner = ctx.saved_tensors
        up_later, down_later = map(later, ctx.weights)
        grad_x, grad_weights = x.new_empty(x.shape), weights.new_empty(weights.shape)
        grad_up = _total(ctx.counts, inner, x) if ctx.needs_input_grad[1] and not up_later else None
        grad_down = _total(ctx.counts, grad, inner) if ctx.needs_input_grad[2] and not down_later else None
        grads_inner = torch.empty_like(inner) if up_later else None
        factor = weights.unsqueeze(1)
        for e, rows in _slices(ctx.counts):
            own, own_grad = inner[rows], grad[rows]
            squared = own * own
            scratch = torch.empty_like(own) if grads_inner is None else grads_inner[rows]
            grad_inner = torch.mm(own_grad, down[e], out=scratch)
            torch.sum(grad_inner * squared, -1, out=grad_weights[rows])
            if grad_down is not None:
                torch.mm(own_grad.t(), squared.mul_(factor[rows]), out=grad_down[e])
            grad_inner.mul_(own).mul_(factor[rows] * 2)
            torch.mm(grad_inner, up[e], out=grad_x[rows])
            if grad_up is not None:
                torch.mm(grad_inner.t(), x[rows], out=grad_up[e])
        if down_later:
            gradient(ctx.weights[1], _grad_down, grad, inner, weights, ctx.counts)
        if up_later:
            gradient(ctx.weights[0], _grad_up, grads_inner, x, ctx.counts)
        return grad_x, grad_up, grad_down, grad_weights, None


def _infer(x: Tensor, up: Tensor, down: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """The same without a gradient to prepare."""
    y, factor = x.new_empty(x.shape), weights.unsqueeze(1)
    for e, rows in _slices(counts):
        inner = linear(x[rows], up[e]).relu_().square_().mul_(factor[rows])
        y[rows] = linear(inner, down[e])
    return y


def _groupable(x: Tensor, inner: int) -> bool:
    """``grouped_mm`` wants rows of whole 16 bytes, and not fp64."""
    whole = x.shape[1] * x.element_size() % 16 == 0 and inner * x.element_size() % 16 == 0
    return len(x) in GROUPED_ROWS and whole and x.dtype != torch.float64 and x.device.type == "cpu"


def _infer_grouped(x: Tensor, up: Tensor, down: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """The same in two grouped products, for few rows on many experts."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inner = F.grouped_mm(x, up.transpose(1, 2), offs=ends)
    return F.grouped_mm(inner.relu_().square_().mul_(weights.unsqueeze(1)), down.transpose(1, 2), offs=ends)


def expert_mlp(x: Tensor, up: Tensor, down: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """See ``weft.ops.experts.expert_mlp``."""
    if torch.is_grad_enabled():
        return _Experts.apply(x, up, down, weights, counts)
    run = _infer_grouped if _groupable(x, up.shape[1]) else _infer
    return run(x, up, down, counts, weights)
