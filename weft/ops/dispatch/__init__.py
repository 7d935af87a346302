"""Tokens to (token, slot) rows in expert order, and back: one permutation, each the other's transpose."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def _to_rows(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    return x.index_select(0, order // back.shape[1])


def _to_tokens(rows: Tensor, back: Tensor) -> Tensor:
    return F.embedding_bag(back, rows, mode="sum")  # adds in slot order, without a copy of all rows


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return _to_rows(x, order, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Collect.apply(grads[0], order, back), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order, back)
        return _to_tokens(rows, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, back = ctx.saved_tensors
        return _Spread.apply(grads[0], order, back), None, None


def spread(
    x: Float[Tensor, "tokens width"], order: Int[Tensor, " rows"], back: Int[Tensor, "tokens slots"]
) -> Float[Tensor, "rows width"]:
    """Row ``order[r] // slots`` of ``x`` for each r. ``back[t, s]`` is where pair (t, s) went.

    The gradient gathers by ``back`` and sums slots in order: no scatter-add, so it is the same
    bits on every run and device.
    """
    return _Spread.apply(x, order, back) if torch.is_grad_enabled() else _to_rows(x, order, back)


def collect(
    rows: Float[Tensor, "rows width"], order: Int[Tensor, " rows"], back: Int[Tensor, "tokens slots"]
) -> Float[Tensor, "tokens width"]:
    """Sum over slots of ``rows[back[t, s]]``, in slot order: the transpose of ``spread``."""
    return _Collect.apply(rows, order, back) if torch.is_grad_enabled() else _to_tokens(rows, back)
