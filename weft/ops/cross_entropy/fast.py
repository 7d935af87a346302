"""Chunked cross-entropy whose gradients are formed in the forward pass.

The global number of targets is known before the forward pass (``scale``), so nothing has to wait
for the backward pass, and no logits are kept or computed twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, scale: float) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = _wide(weight)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(wide) if need_weight else None
        loss = wide.new_zeros(())
        for at in range(0, len(targets), chunk):
            h, target = _wide(hidden[at : at + chunk]), targets[at : at + chunk].unsqueeze(1)
            factor = (target >= 0).to(h.dtype).mul_(scale)
            target = target.clamp_min(0)
            logp = torch.log_softmax(h @ wide.t(), dim=-1)
            loss -= (logp.gather(1, target) * factor).sum()
            grad = logp.exp_().scatter_add_(1, target, logp.new_full((1, 1), -1.0).expand_as(target))
            if grad_hidden is not None:
                grad_hidden[at : at + chunk] = (grad @ wide).mul_(factor)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), h * factor)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grads = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, scale: float) -> Tensor:
    """See ``weft.ops.cross_entropy.linear_cross_entropy``."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _Loss.apply(hidden, weight, targets, chunk, scale)
    return linear_nll(hidden, weight, targets, chunk).sum() * scale


@torch.no_grad()
def linear_nll(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """See ``weft.ops.cross_entropy.linear_nll``."""
    wide = _wide(weight)
    nll = wide.new_empty(len(targets))
    for at in range(0, len(targets), chunk):
        logits = _wide(hidden[at : at + chunk]) @ wide.t()
        target = targets[at : at + chunk].clamp_min(0).unsqueeze(1)
        nll[at : at + chunk] = logits.logsumexp(-1) - logits.gather(1, target).squeeze(1)
    return nll.masked_fill_(targets < 0, 0.0)
