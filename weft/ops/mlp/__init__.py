"""Squared-ReLU MLP (So et al. 2021, arXiv 2109.08668), without a gate."""

from jaxtyping import Float
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.mlp import fast, reference

BACKENDS = {"reference": reference.mlp, "fast": fast.mlp}


def mlp(
    x: Float[Tensor, "tokens width"], up: Float[Tensor, "inner width"], down: Float[Tensor, "out inner"]
) -> Float[Tensor, "tokens out"]:
    """``relu(x up^T)^2 down^T``."""
    return pick("mlp", BACKENDS)(x, up, down)
