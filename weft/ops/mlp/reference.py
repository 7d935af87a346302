"""Squared-ReLU MLP, as written in the paper."""

from torch import Tensor
from torch.nn import functional as F


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """See ``weft.ops.mlp.mlp``."""
    return F.linear(F.linear(x, up).relu().square(), down)
