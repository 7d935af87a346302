"""Sigmoid routing with correction bias and group limit, and its losses (arXiv 2412.19437, 2.1.2)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.router import fast, reference

ROUTE_BACKENDS = {"reference": reference.route, "fast": fast.route}
BALANCE_BACKENDS = {"reference": reference.document_balance, "fast": fast.document_balance}
FITS_BACKENDS = {"reference": reference.fits, "fast": fast.fits}


def route(
    logits: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"],
    top_k: int,
    groups: tuple[int, int] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    choices: Int[Tensor, "tokens top_k"] | None = None,
    holes: bool = False,
) -> tuple[Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"], Float[Tensor, "tokens experts"]]:
    """Weights, experts and sigmoid scores of each token.

    Experts are chosen by ``score + bias``; weights are the scores without bias. Only the weights carry
    gradient.

    Args:
        logits: router logits.
        bias: correction bias, for the choice only.
        top_k: experts per token.
        groups: groups of experts, and how many of them a token may use: those whose two best experts have
            the highest sum of score and bias. None is no limit.
        normalize: divide the weights by their sum (at least 1e-20).
        scale: factor on the weights.
        choices: experts to force, instead of choosing (replay).
        holes: whether choices may be -1: no expert, weight 0.
    """
    return pick("router", ROUTE_BACKENDS)(logits, bias, top_k, groups, normalize, scale, choices, holes)


def fits(
    ranking: Int64[Tensor, "tokens slots"],
    experts: Int64[Tensor, "tokens slots"],
    groups: Sequence[int],
    limits: Sequence[int],
) -> Bool[Tensor, "tokens slots"]:
    """Which pairs (token, slot) experts take: the largest ``ranking``, then the first token, then slot.

    Args:
        ranking: of each pair, at least 0 and below 2^24.
        experts: of each pair; -1 is none, and never taken.
        groups: tokens of each group, in order.
        limits: pairs that an expert takes of each group.
    """
    device = experts.device
    lengths, most = (torch.tensor(n, dtype=torch.int64).to(device) for n in (groups, limits))
    return pick("router", FITS_BACKENDS)(ranking, experts, group_ids(lengths, len(experts)), most)


def group_ids(lengths: Int[Tensor, " groups"], tokens: int) -> Int64[Tensor, " tokens"]:
    """The group of each of so many tokens."""
    places = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(places, lengths, output_size=tokens)


def tally(places: Int64[Tensor, "..."], size: int) -> Int64[Tensor, " size"]:
    """How often each number of ``range(size)`` occurs; negative ones are not counted.

    Unlike ``bincount`` it never waits for the device.
    """
    flat = places.flatten()
    counts = flat.new_zeros(size + 1)
    return counts.scatter_add_(0, torch.where(flat < 0, size, flat), torch.ones_like(flat))[:size]


def count_choices(
    experts: Int[Tensor, "tokens top_k"], ids: Int[Tensor, " tokens"], documents: int, num_experts: int
) -> Int[Tensor, "documents experts"]:
    """How often the tokens here of each document chose each expert.

    Args:
        experts: chosen experts; -1 is none.
        ids: document of each token.
        documents: documents of the whole run of tokens.
        num_experts: routed experts.
    """
    places = torch.where(experts < 0, -1, ids.unsqueeze(1) * num_experts + experts)
    return tally(places, documents * num_experts).view(documents, num_experts)


def choice_frequency(
    chosen: Int[Tensor, "documents experts"], lengths: Float[Tensor, " documents"], top_k: int
) -> Float[Tensor, "documents experts"]:
    """``f_i = E / (k T) * |tokens of the document that chose i|`` (DeepSeek-V3, eq. 18)."""
    return chosen * (chosen.shape[1] / top_k / lengths.clamp_min(1)).unsqueeze(1)


def choice_share(chosen: Int[Tensor, " experts"], dtype: torch.dtype) -> Float[Tensor, " experts"]:
    """``choice_frequency`` where ``k T`` is the number of choices: each expert's part, over an even one."""
    return len(chosen) * chosen.to(dtype) / chosen.sum().clamp_min(1)


def document_balance(
    scores: Float[Tensor, "tokens experts"],
    ids: Int[Tensor, " tokens"],
    frequency: Float[Tensor, "documents experts"],
) -> Float[Tensor, ""]:
    """Sum over documents of (tokens of the document) times its balance loss, DeepSeek-V3 eq. 17 to 20.

    ``L = sum_i f_i P_i`` with ``P_i`` the mean over the document's tokens of score i over the sum of the
    token's scores (at least 1e-20). Of a document that other ranks hold too, the part of the tokens here.
    The caller multiplies ``frequency`` by the coefficient and divides by the global number of tokens.
    """
    return pick("router", BALANCE_BACKENDS)(scores, ids, frequency)


def z_loss(logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """Sum over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().sum()
