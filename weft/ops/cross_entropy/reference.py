"""Cross-entropy through full logits."""

import torch
from torch import Tensor
from torch.nn import functional as F


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(wide), weight.to(wide))
    return F.cross_entropy(logits, targets.masked_fill(targets < 0, -1), ignore_index=-1, reduction="none")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, scale: float) -> Tensor:
    """See ``weft.ops.cross_entropy.linear_cross_entropy``; ``chunk`` is not used."""
    return _nll(hidden, weight, targets).sum() * scale


@torch.no_grad()
def linear_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """See ``weft.ops.cross_entropy.linear_nll``; ``chunk`` is not used."""
    return _nll(hidden, weight, targets)
