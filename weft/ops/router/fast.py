"""Routing with one hand-written gradient, and the balance loss of all documents at once."""

import torch
from torch import Tensor

from weft.ops.router.reference import choose
from weft.ops.segments import Segments


def route(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    limits: tuple[int, int] | None,
    normalize: bool,
    scale: float,
    choices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``weft.ops.router.route``."""
    scores = logits.sigmoid()
    experts = choose(scores.detach() + bias, top_k, limits) if choices is None else choices
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights * (scale / (weights.sum(-1, keepdim=True) + 1e-20))
    elif scale != 1.0:
        weights = weights * scale
    return weights, experts, scores


def document_balance(scores: Tensor, experts: Tensor, segments: Segments, coef: float) -> Tensor:
    """See ``weft.ops.router.document_balance``.

    ``sum_doc T_doc coef sum_i f_i P_i = sum_t sum_i (coef E / (k T_doc(t))) n_doc(t),i s'_t,i``.
    """
    num_experts, top_k = scores.shape[1], experts.shape[1]
    docs, ids = len(segments.lengths), segments.ids(scores.device)
    places = (ids.unsqueeze(1) * num_experts + experts).flatten()
    chosen = torch.bincount(places, minlength=docs * num_experts).view(docs, num_experts)
    lengths = torch.tensor(segments.lengths, dtype=scores.dtype).clamp_min(1).to(scores.device)
    frequency = chosen * (coef * num_experts / top_k / lengths).unsqueeze(1)
    weighted = (scores * frequency[ids]).sum(-1)
    return (weighted / scores.sum(-1)).sum()
