"""Squared-ReLU MLPs of many experts over rows sorted by expert."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.experts import fast, reference

BACKENDS = {"reference": reference.expert_mlp, "fast": fast.expert_mlp}


def expert_mlp(
    x: Float[Tensor, "rows width"],
    up: Float[Tensor, "experts inner width"],
    down: Float[Tensor, "experts width inner"],
    counts: Sequence[int] | Int[Tensor, " experts"],
    weights: Float[Tensor, " rows"],
) -> Float[Tensor, "rows width"]:
    """``down_e (weight * relu(up_e x)^2)`` for each row of expert e.

    Args:
        x: inputs, the rows of expert 0 first.
        up: first matrices.
        down: second matrices.
        counts: rows of each expert, summing to ``rows``.
        weights: routing weight of each row.
    """
    sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    return pick("experts", BACKENDS)(x, up, down, sizes, weights)
