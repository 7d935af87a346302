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


def _softmax_(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax in place; returns ``-log`` of it at ``target`` (``[rows, 1]``), exact also where it underflows.

    ``logsumexp = z - log softmax(z)`` for any logit z; the largest is the one that loses nothing. So the
    exponentials are taken once.
    """
    at, top = logits.gather(1, target), logits.amax(-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    return top.sub_(logits.amax(-1, keepdim=True).log_()).sub_(at)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, scale: float
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = _wide(weight)
        grad_hidden = hidden.new_empty(hidden.shape) if need_hidden else None
        grad_weight = torch.zeros_like(wide) if need_weight else None
        loss = wide.new_zeros(())
        logits = wide.new_empty(min(chunk, len(targets)), len(weight))
        for at in range(0, len(targets), chunk):
            h, target = _wide(hidden[at : at + chunk]), targets[at : at + chunk].unsqueeze(1)
            factor = (target >= 0).to(h.dtype).mul_(scale)
            target = target.clamp_min(0)
            grad = torch.mm(h, wide.t(), out=logits[: len(h)])
            loss += (_softmax_(grad, target) * factor).sum()
            grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
            if grad_hidden is not None:
                grad_hidden[at : at + chunk] = (grad @ wide).mul_(factor)
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), h * factor)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    logits = wide.new_empty(min(chunk, len(targets)), len(weight))
    for at in range(0, len(targets), chunk):
        h, target = _wide(hidden[at : at + chunk]), targets[at : at + chunk].clamp_min(0).unsqueeze(1)
        own = torch.mm(h, wide.t(), out=logits[: len(h)])
        nll[at : at + chunk] = _softmax_(own, target).squeeze(1)
    return nll.masked_fill_(targets < 0, 0.0)
