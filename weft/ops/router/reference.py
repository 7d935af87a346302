"""Routing step by step, and the balance loss document by document."""

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.segments import Segments


def choose(ranking: Tensor, top_k: int, limits: tuple[int, int] | None) -> Tensor:
    """The ``top_k`` experts of each token by ``ranking``, inside its best groups."""
    if limits:
        groups, top_groups = limits
        by_group = ranking.unflatten(-1, (groups, -1))
        best = (
            by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        )
        allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
        ranking = by_group.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    return ranking.topk(top_k, dim=-1).indices


def route(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    limits: tuple[int, int] | None,
    normalize: bool,
    scale: float,
    choices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``weft.ops.router.route``; ``limits`` is (groups, top_groups) or None."""
    scores = logits.sigmoid()
    experts = choose(scores.detach() + bias, top_k, limits) if choices is None else choices
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts, scores


def document_balance(scores: Tensor, experts: Tensor, segments: Segments, coef: float) -> Tensor:
    """See ``weft.ops.router.document_balance``."""
    total = scores.new_zeros(())
    num_experts, top_k = scores.shape[1], experts.shape[1]
    for start, length in zip(segments.starts, segments.lengths, strict=True):
        if not length:
            continue
        own = scores[start : start + length]
        chosen = F.one_hot(experts[start : start + length], num_experts).sum((0, 1))
        frequency = chosen.to(scores.dtype) * (num_experts / (top_k * length))
        probability = (own / own.sum(-1, keepdim=True)).mean(0)
        total = total + length * coef * (frequency * probability).sum()
    return total
