"""Norms with hand-written gradients: they keep their inputs and one number per normalized group."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _rstd(grouped: Tensor, eps: float) -> Tensor:
    """``1 / rms`` of the last dimension, kept as size 1."""
    norm = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    return norm.square_().div_(grouped.shape[-1]).add_(eps).rsqrt_()


def _grad_normalized(grad: Tensor, normalized: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of ``x`` in ``normalized = x * rstd(x)``; writes into ``grad``."""
    mean = (grad * normalized).mean(-1, keepdim=True)
    return grad.addcmul_(normalized, mean, value=-1).mul_(rstd)


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    rstd = _rstd(wide, eps)
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


def _gate_and_normalize(y: Tensor, z: Tensor, weight: Tensor, group: int, eps: float) -> tuple[Tensor, Tensor]:
    wide_z = _wide(z)
    gated = torch.sigmoid(wide_z).mul_(wide_z).mul_(y).unflatten(-1, (-1, group))
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
        grad, normalized = _wide(grad), _wide(x) * rstd
        grad_weight = (grad * normalized).sum(0).to(weight.dtype)
        grad_x = _grad_normalized(grad * weight, normalized, rstd)
        return grad_x.to(x.dtype), grad_weight, None


class _GatedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, group: int, eps: float) -> Tensor:
        normalized, rstd = _gate_and_normalize(y, z, weight, group, eps)
        ctx.save_for_backward(y, z, weight, rstd)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, z, weight, rstd = ctx.saved_tensors
        wide_y, wide_z = _wide(y), _wide(z)
        groups = (rstd.shape[-2], y.shape[-1] // rstd.shape[-2])
        gate = torch.sigmoid(wide_z)
        silu = gate * wide_z
        normalized = (silu * wide_y).unflatten(-1, groups).mul_(rstd)
        grad = _wide(grad)
        grad_weight = (grad * normalized.flatten(-2)).sum(0).to(weight.dtype)
        grad_gated = _grad_normalized((grad * weight).unflatten(-1, groups), normalized, rstd).flatten(-2)
        # silu'(z) = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(gate, silu, 1 - gate)
        grad_z = slope.mul_(wide_y).mul_(grad_gated).to(z.dtype)
        return grad_gated.mul_(silu).to(y.dtype), grad_z, grad_weight, None, None


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
