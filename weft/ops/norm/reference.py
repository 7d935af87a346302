"""Norms, as written in the papers; reduced precision is computed in fp32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``weft.ops.norm.rms_norm``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(x.dtype)


def gated_group_norm(y: Tensor, z: Tensor, weight: Tensor, group: int, eps: float) -> Tensor:
    """See ``weft.ops.norm.gated_group_norm``."""
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(wide) * F.silu(z.to(wide))
    grouped = gated.unflatten(-1, (-1, group))
    scale = (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((grouped * scale).flatten(-2) * weight).to(y.dtype)
