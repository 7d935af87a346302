"""One expert after another."""

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_mlp(x: Tensor, up: Tensor, down: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """See ``weft.ops.experts.expert_mlp``."""
    out = []
    for e, (rows, weight) in enumerate(zip(x.split(counts), weights.split(counts), strict=True)):
        inner = F.linear(rows, up[e]).relu().square() * weight.unsqueeze(1)
        out.append(F.linear(inner, down[e]))
    return torch.cat(out)
