"""Routing, the balance loss of all documents at once, and capacity by one sort."""

import torch
from torch import Tensor

from weft.ops.router.reference import choose


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
    """See ``weft.ops.router.route``."""
    scores = logits.sigmoid()
    experts = choose(scores.detach() + bias, top_k, limits) if choices is None else choices
    weights = scores.gather(1, experts.clamp_min(0) if holes else experts)
    if holes:
        weights = weights.masked_fill(experts < 0, 0.0)
    if normalize:
        weights = weights * (scale / weights.sum(-1, keepdim=True).clamp_min(1e-20))
    elif scale != 1.0:
        weights = weights * scale
    return weights, experts, scores


def document_balance(scores: Tensor, ids: Tensor, frequency: Tensor) -> Tensor:
    """See ``weft.ops.router.document_balance``: ``sum_t sum_i f_doc(t),i s_t,i / sum_j s_t,j``."""
    return ((scores * frequency[ids]).sum(-1) / scores.sum(-1).clamp_min(1e-20)).sum()


def fits(ranking: Tensor, experts: Tensor, ids: Tensor, limits: Tensor) -> Tensor:
    """See ``weft.ops.router.fits``: pairs sorted by expert and group, then falling by ranking."""
    groups = max(1, len(limits))
    cells = torch.where(experts < 0, -1, experts * groups + ids.unsqueeze(1)).flatten()
    order = ((cells << 24) - ranking.flatten()).sort(stable=True).indices
    cells = cells[order]
    place = torch.arange(len(cells), device=cells.device) - torch.searchsorted(cells, cells)
    most = limits[cells % groups] if len(cells) else cells
    taken = (place < most) & (cells >= 0)
    return torch.empty_like(taken).scatter_(0, order, taken).view(experts.shape)
