"""A fingerprint of the routing choices of a step, the same under every layout."""

import torch
from torch import Tensor

from weft.models.hybrid import HybridLM, Losses
from weft.ops.mix import mix, salt
from weft.train.objective import Run


def routing_hash(model: HybridLM, run: Run, losses: Losses) -> Tensor:
    """A number for one microbatch, to be added (mod 2^64) over microbatches and ranks.

    Every (layer, token of a sample, chosen expert) is mixed to 64 bits and these are summed, so that neither
    the order of tokens nor who routes them matters.
    """
    total = torch.zeros((), dtype=torch.int64, device=run.tokens.device)
    where = run.places[model.rows(len(run.tokens))].unsqueeze(1)
    for layer, experts in losses.choices.items():
        total += mix(mix(where + salt(layer)) + experts).sum()
    return total


def as_text(total: Tensor) -> str:
    """16 hexadecimal digits."""
    return f"{int(total.item()) & (1 << 64) - 1:016x}"
