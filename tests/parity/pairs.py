"""Pairs of one model in transformers and here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.models.hf_hybrid import LIVE, tensor_links
from weft.models.hybrid import HybridLM
from weft.spec.hybrid import HybridConfig


@dataclass(frozen=True)
class Pair:
    """One model twice.

    Attributes:
        config: its config here.
        theirs: transformers' model.
        mtp: MTP depths made of transformers' blocks, or None.
        ours: our model, with the same values.
    """

    config: HybridConfig
    theirs: Any
    mtp: Any
    ours: HybridLM


def gather(config: HybridConfig, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from those of a live model of transformers (values or gradients)."""
    found = {spec.name: torch.full(spec.shape, torch.nan) for spec in config.params()}
    for link in tensor_links(config, LIVE):
        if link.theirs in live and not link.copy:
            box = tuple(slice(a, a + n) for a, n in zip(link.start, link.size, strict=True))
            found[link.ours][box] = live[link.theirs].view(link.size)
    return found


def live_tensors(model: Any, mtp: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Values or gradients of parameters, and buffers, by live name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    if mtp is not None:
        named += [(f"mtp.{name}", t) for name, t in [*mtp.named_parameters(), *mtp.named_buffers()]]
    if gradients:
        return {name: t.grad for name, t in named if t.grad is not None}
    return {name: t.detach() for name, t in named}
