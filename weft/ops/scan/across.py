"""What a state that stood before some tokens adds to their outputs.

The scan is linear in its state, so tokens may be scanned from zero before their state is known, and what it
gives added when it is:

    y_t = rise_t C_t . h,  rise_t = exp(sum_{s <= t} dt_s A)
"""

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.blocks import block_rows, blocks

BLOCK_NUMBERS = 2**18  # of the output in one block
MARGIN = 16.0  # in the logarithm, above the least normal number: products of what is left stay normal


def reference(dt: Tensor, A: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """See ``weft.ops.scan.across``; token by token."""
    wide = torch.promote_types(state.dtype, torch.float32)
    dt, A, C, h = (t.to(wide) for t in (dt, A, C, state))
    C = C.repeat_interleave(len(A) // C.shape[1], dim=1)
    out = []
    for t in range(len(dt)):
        h = (dt[t] * A).exp()[:, None, None] * h
        out.append((h * C[t].unsqueeze(1)).sum(-1))
    return torch.stack(out)


class _Inputs(NamedTuple):
    """The inputs as given, and their parts in the dtype of the result."""

    dt: Tensor
    A: Tensor
    C: Tensor
    state: Tensor

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.state.dtype, torch.float32)

    def blocks(self) -> Iterator[slice]:
        heads, dim, _ = self.state.shape
        return blocks(len(self.dt), block_rows(self.dt.device, heads * dim, BLOCK_NUMBERS))

    def rise(self) -> Tensor:
        """``[tokens, heads]``; what would underflow is 0."""
        least = log(torch.finfo(self.wide).tiny) + MARGIN
        cum = (self.dt.to(self.wide) * self.A.to(self.wide)).cumsum(0)
        return cum.clamp(least, 0).exp_().mul_(cum > least)

    def directions(self, rows: slice) -> Tensor:
        """``[groups, rows, state]``."""
        return self.C[rows].to(self.wide).transpose(0, 1)

    def columns(self) -> Tensor:
        """The state as ``[groups, state, own heads * dim]``."""
        inner = self.state.to(self.wide).unflatten(0, (self.C.shape[1], -1))
        return inner.flatten(1, 2).transpose(1, 2)

    def by_head(self, t: Tensor) -> Tensor:
        """``[groups, rows, own heads * dim]`` as ``[rows, heads, dim]``."""
        return t.unflatten(2, (-1, self.state.shape[1])).transpose(0, 1).flatten(1, 2)

    def by_group(self, t: Tensor) -> Tensor:
        """The way back."""
        return t.unflatten(1, (self.C.shape[1], -1)).flatten(2).transpose(0, 1)


class _Across(torch.autograd.Function):
    """Only inputs are kept: the products are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        own = _Inputs(*given)
        rise, columns = own.rise().unsqueeze(-1), own.columns()
        y = columns.new_empty(len(own.dt), *own.state.shape[:2])
        for rows in own.blocks():
            torch.mul(own.by_head(own.directions(rows) @ columns), rise[rows], out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        own = _Inputs(*ctx.saved_tensors)
        rise, columns = own.rise().unsqueeze(-1), own.columns()
        grad_log, grad_C = torch.zeros_like(rise), torch.empty_like(own.C, dtype=own.wide)
        grad_columns = torch.zeros_like(columns)
        for rows in own.blocks():
            C = own.directions(rows)
            into = own.by_group(grad[rows] * rise[rows])
            grad_log[rows] = own.by_head((C @ columns).mul_(into)).sum(-1, keepdim=True)
            grad_C[rows] = (into @ columns.transpose(1, 2)).transpose(0, 1)
            grad_columns += C.transpose(1, 2) @ into
        grad_log = grad_log.squeeze(-1).flip(0).cumsum(0).flip(0)
        grad_state = grad_columns.transpose(1, 2).reshape(own.state.shape)
        grads = grad_log * own.A, (grad_log * own.dt).sum(0), grad_C, grad_state
        return tuple(g.to(t.dtype) for g, t in zip(grads, own, strict=True))


def fast(dt: Tensor, A: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """See ``weft.ops.scan.across``; as matrix products, over blocks of tokens."""
    return _Across.apply(dt, A, C, state)
