"""Norms with hand-written gradients: they keep their inputs and one number per normalized group.

Both work on blocks of rows that stay in the cache between the dozen passes of a gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.ops.blocks import block_rows, blocks

BLOCK_NUMBERS = 2**18


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _blocks(x: Tensor) -> Iterator[slice]:
    return blocks(len(x), block_rows(x.device, x.shape[1], BLOCK_NUMBERS))


def _rstd(grouped: Tensor, eps: float) -> Tensor:
    """``1 / rms`` of the last dimension, kept as size 1."""
    norm = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    return norm.square_().div_(grouped.shape[-1]).add_(eps).rsqrt_()


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rstd = _rstd(wide, eps)
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


def _gate_and_normalize(
    y: Tensor, z: Tensor, weight: Tensor, group: int, eps: float
) -> tuple[Tensor, Tensor]:
    gated = F.silu(_wide(z)).mul_(y).unflatten(-1, (-1, group))
    rstd = _rstd(gated, eps)
    return gated.mul_(rstd).flatten(-2).mul_(weight).to(y.dtype), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = x.new_empty(x.shape), torch.zeros_like(weight, dtype=rstd.dtype)
        wide_weight = weight.to(rstd.dtype)
        for rows in _blocks(x):
            own, own_grad, scale = _wide(x[rows]), _wide(grad[rows]), rstd[rows]
            # x_hat = x * scale; dx = scale * (w grad - x_hat * mean(w grad x_hat))
            product = own_grad * own
            grad_weight.addmv_(product.t(), scale.squeeze(1))
            mean = (product @ wide_weight).unsqueeze(1).mul_(scale.pow(3)).div_(-x.shape[1])
            grad_x[rows] = torch.mul(own_grad, wide_weight, out=product).mul_(scale).addcmul_(own, mean)
        return grad_x, grad_weight.to(weight.dtype), None


class _GatedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, group: int, eps: float) -> Tensor:
        rstd = _wide(y.new_empty(len(y), y.shape[1] // group, 1))
        out = y.new_empty(y.shape)
        for rows in _blocks(y):
            out[rows], rstd[rows] = _gate_and_normalize(y[rows], z[rows], weight, group, eps)
        ctx.save_for_backward(y, z, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, z, weight, rstd = ctx.saved_tensors
        grad_y, grad_z = y.new_empty(y.shape), z.new_empty(z.shape)
        grad_weight, wide_weight = torch.zeros_like(weight, dtype=rstd.dtype), weight.to(rstd.dtype)
        groups = (rstd.shape[1], -1)
        for rows in _blocks(y):
            own_y, own_z, own_grad = (_wide(t[rows]) for t in (y, z, grad))
            silu, scale = F.silu(own_z), rstd[rows]
            normalized = (silu * own_y).unflatten(1, groups).mul_(scale)
            product = own_grad * normalized.flatten(1)
            grad_weight += product.sum(0)
            mean = product.mul_(wide_weight).unflatten(1, groups).mean(-1, keepdim=True)
            gated = (own_grad * wide_weight).unflatten(1, groups)
            gated = gated.addcmul_(normalized, mean, value=-1).mul_(scale).flatten(1)
            grad_y[rows] = silu.mul_(gated)
            grad_z[rows] = torch.ops.aten.silu_backward(gated.mul_(own_y), own_z)
        return grad_y, grad_z, grad_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``weft.ops.norm.rms_norm``."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _normalize(x, weight, eps)[0]  # decoding: the autograd call alone costs as much as the norm


def gated_group_norm(y: Tensor, z: Tensor, weight: Tensor, group: int, eps: float) -> Tensor:
    """See ``weft.ops.norm.gated_group_norm``."""
    if torch.is_grad_enabled():
        return _GatedGroupNorm.apply(y, z, weight, group, eps)
    return _gate_and_normalize(y, z, weight, group, eps)[0]
