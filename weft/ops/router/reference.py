"""Routing step by step, the balance loss document by document, and capacity pair by pair."""

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
    holes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``weft.ops.router.route``; ``limits`` is (groups, top_groups) or None."""
    scores = logits.sigmoid()
    experts = choose(scores.detach() + bias, top_k, limits) if choices is None else choices
    weights = scores.gather(1, experts.clamp_min(0)) * (experts >= 0)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return weights * scale, experts, scores


def document_balance(scores: Tensor, ids: Tensor, frequency: Tensor) -> Tensor:
    """See ``weft.ops.router.document_balance``."""
    total = scores.new_zeros(())
    for document, own_frequency in enumerate(frequency):
        own = scores[ids == document]
        if len(own):
            probability = (own / own.sum(-1, keepdim=True).clamp_min(1e-20)).mean(0)
            total = total + len(own) * (own_frequency * probability).sum()
    return total


def fits(ranking: Tensor, experts: Tensor, ids: Tensor, limits: Tensor) -> Tensor:
    """See ``weft.ops.router.fits``."""
    taken = torch.zeros_like(experts, dtype=torch.bool)
    tokens, slots = experts.shape
    pairs = [(int(ids[t]), int(experts[t, s]), t, s) for t in range(tokens) for s in range(slots)]
    for group, limit in enumerate(limits.tolist()):
        for expert in {e for g, e, _, _ in pairs if g == group and e >= 0}:
            offered = [(t, s) for g, e, t, s in pairs if (g, e) == (group, expert)]
            offered.sort(key=lambda pair: -int(ranking[pair]))  # stable: first tokens first
            for pair in offered[:limit]:
                taken[pair] = True
    return taken
