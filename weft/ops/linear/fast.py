"""Few tokens on a CPU read the weight at the speed of memory; everything else is ``F.linear``.

Decoding multiplies a few rows by weights that the cache does not hold, so the bytes of the weight are the
limit. Measured on two cores (torch 2.13, fp32, weight 1024 x 256 from memory), microseconds:

    tokens          1     2     8    32   128
    F.linear      116   153   189   287   508
    here           26    35    78   158   400
    bytes, 40 GB/s 26    26    26    26    26
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.ops.late import gradient, outer, queued

FEW = 64  # tokens; beyond it the gain is small


class _Linear(torch.autograd.Function):
    """``F.linear`` whose weight's gradient may come later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, gradient(ctx.weight, outer, grad, x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ``weft.ops.linear.linear``."""
    tokens, training = x.shape[0], torch.is_grad_enabled()
    if training and queued(weight) is not None:
        return _Linear.apply(x, weight)
    if tokens > FEW or tokens == 0 or training or x.device.type != "cpu":
        return F.linear(x, weight)
    rows = weight.shape[0]
    if tokens > 1 or rows % 2:
        return torch.mm(weight, x.t()).t()
    halves = weight.view(
        2, rows // 2, -1
    )  # a batch of two is what BLAS spreads over memory channels and cores
    return torch.bmm(halves, x.t().expand(2, -1, 1)).view(1, rows)
