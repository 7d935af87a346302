"""Root-mean-square norms. Statistics are taken in fp32 or wider."""

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
