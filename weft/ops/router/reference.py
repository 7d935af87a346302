"""Routing step by step, and the balance loss document by document."""

import torch
from torch import Tensor


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


def document_balance(scores: Tensor, ids: Tensor, frequency: Tensor) -> Tensor:
    """See ``weft.ops.router.document_balance``."""
    total = scores.new_zeros(())
    for document, own_frequency in enumerate(frequency):
        own = scores[ids == document]
        if len(own):
            probability = (own / own.sum(-1, keepdim=True)).mean(0)
            total = total + len(own) * (own_frequency * probability).sum()
    return total
