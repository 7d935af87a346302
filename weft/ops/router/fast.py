"""Routing with one hand-written gradient, and the balance loss of all documents at once."""

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


def document_balance(scores: Tensor, ids: Tensor, frequency: Tensor) -> Tensor:
    """See ``weft.ops.router.document_balance``: ``sum_t sum_i f_doc(t),i s_t,i / sum_j s_t,j``."""
    return ((scores * frequency[ids]).sum(-1) / scores.sum(-1)).sum()
