"""``y = x W^T``."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.ops.backend import pick
from weft.ops.linear import fast

BACKENDS = {"reference": F.linear, "fast": fast.linear}


def linear(
    x: Float[Tensor, "tokens cols"], weight: Float[Tensor, "rows cols"]
) -> Float[Tensor, "tokens rows"]:
    """``x weight^T``, with gradients."""
    return pick("linear", BACKENDS)(x, weight)
