"""Sigmoid routing with correction bias and group limit, and its losses (arXiv 2412.19437, 2.1.2)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.router import fast, reference

ROUTE_BACKENDS = {"reference": reference.route, "fast": fast.route}
BALANCE_BACKENDS = {"reference": reference.document_balance, "fast": fast.document_balance}


def route(
    logits: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"],
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    choices: Int[Tensor, "tokens top_k"] | None = None,
) -> tuple[Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"], Float[Tensor, "tokens experts"]]:
    """Weights, experts and sigmoid scores of each token.

    Experts are chosen by ``score + bias`` among the ``top_groups`` groups whose two best experts
    score highest; weights are the scores without bias. Only the weights carry gradient.

    Args:
        logits: router logits.
        bias: correction bias, for the choice only.
        top_k: experts per token.
        groups: groups of experts; 1 is no limit.
        top_groups: groups a token may use.
        normalize: divide the weights by their sum (plus 1e-20).
        scale: factor on the weights.
        choices: experts to force, instead of choosing (replay).
    """
    limits = (groups, top_groups) if groups > 1 else None
    return pick("router", ROUTE_BACKENDS)(logits, bias, top_k, limits, normalize, scale, choices)


def count_choices(
    experts: Int[Tensor, "tokens top_k"], ids: Int[Tensor, " tokens"], documents: int, num_experts: int
) -> Int[Tensor, "documents experts"]:
    """How often the tokens here of each document chose each expert.

    Args:
        experts: chosen experts.
        ids: document of each token.
        documents: documents of the whole run of tokens.
        num_experts: routed experts.
    """
    places = (ids.unsqueeze(1) * num_experts + experts).flatten()
    return torch.bincount(places, minlength=documents * num_experts).view(documents, num_experts)


def choice_frequency(
    chosen: Int[Tensor, "documents experts"], lengths: Float[Tensor, " documents"], top_k: int
) -> Float[Tensor, "documents experts"]:
    """``f_i = E / (k T) * |tokens of the document that chose i|`` (DeepSeek-V3, eq. 18)."""
    return chosen * (chosen.shape[1] / top_k / lengths.clamp_min(1)).unsqueeze(1)


def document_balance(
    scores: Float[Tensor, "tokens experts"],
    ids: Int[Tensor, " tokens"],
    frequency: Float[Tensor, "documents experts"],
) -> Float[Tensor, ""]:
    """Sum over documents of (tokens of the document) times its balance loss, DeepSeek-V3 eq. 17 to 20.

    ``L = sum_i f_i P_i`` with ``P_i`` the mean over the document's tokens of score i over the sum of the
    token's scores. Of a document that other ranks hold too, the part of the tokens here. The caller
    multiplies ``frequency`` by the coefficient and divides by the global number of tokens.
    """
    return pick("router", BALANCE_BACKENDS)(scores, ids, frequency)


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Sum over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().sum()
