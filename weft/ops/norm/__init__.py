"""Root-mean-square norms. Statistics are taken in fp32 or wider."""

import torch
from jaxtyping import Float
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.norm import fast, reference

RMS_BACKENDS = {"reference": reference.rms_norm, "fast": fast.rms_norm}
GATED_BACKENDS = {"reference": reference.gated_group_norm, "fast": fast.gated_group_norm}


def rms_norm(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "tokens width"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    return pick("norm", RMS_BACKENDS)(x, weight, eps)


def gated_group_norm(
    y: Float[Tensor, "tokens width"],
    z: Float[Tensor, "tokens width"],
    weight: Float[Tensor, " width"],
    group: int,
    eps: float,
) -> Float[Tensor, "tokens width"]:
    """``rms_norm(y * silu(z))`` over groups of ``group`` channels (0: all of them), gate before norm.

    Source: Mamba-2 (arXiv 2405.21060), with ``norm_before_gate=False``.
    """
    return pick("norm", GATED_BACKENDS)(y, z, weight, group or y.shape[-1], eps)


def sum_of_squares(x: Float[Tensor, "tokens width"], group: int) -> Float[Tensor, "tokens groups 1"]:
    """Sums of squares of each group of channels, or of the part of one group that is here, in fp32 or wider.

    Args:
        x: activations.
        group: channels normalized together; more than ``width`` if other ranks have the rest.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.unflatten(-1, (-1, min(group, x.shape[-1]))).square().sum(-1, keepdim=True)


def normalize(
    x: Float[Tensor, "tokens width"],
    squares: Float[Tensor, "tokens groups 1"],
    group: int,
    weight: Float[Tensor, " width"],
    eps: float,
) -> Float[Tensor, "tokens width"]:
    """``x / sqrt(squares / group + eps) * weight``: ``rms_norm`` from statistics that are complete."""
    scale = (squares / group + eps).rsqrt()
    return ((x.to(squares.dtype).unflatten(-1, (squares.shape[1], -1)) * scale).flatten(-2) * weight).to(
        x.dtype
    )
