"""Few tokens on a CPU read the weight at the speed of memory; everything else is ``F.linear``.

Decoding multiplies a few rows by weights that the cache does not hold, so the bytes of the weight are the
limit. Measured on two cores (torch 2.13, fp32, weight 1024 x 256 from memory), microseconds:

    tokens          1     2     8    32   128
    F.linear      116   153   189   287   508
    here           26    35    78   158   400
    bytes, 40 GB/s 26    26    26    26    26
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = 64  # tokens; beyond it the gain is small


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ``weft.ops.linear.linear``."""
    tokens = x.shape[0]
    if tokens > FEW or tokens == 0 or torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight)
    rows = weight.shape[0]
    if tokens > 1 or rows % 2:
        return torch.mm(weight, x.t()).t()
    halves = weight.view(
        2, rows // 2, -1
    )  # a batch of two is what BLAS spreads over memory channels and cores
    return torch.bmm(halves, x.t().expand(2, -1, 1)).view(1, rows)
