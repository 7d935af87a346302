"""A fingerprint of the routing choices of a step, the same under every layout."""

import hashlib

import torch
from torch import Tensor

from weft.data.batch import Batch
from weft.models.hybrid import HybridLM, Losses

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # odd constants of splitmix64, as signed numbers


def routing_hash(model: HybridLM, batch: Batch, losses: Losses) -> Tensor:
    """A number for one microbatch, to be added (mod 2^64) over microbatches and ranks.

    Every (layer, token of a sample, chosen expert) is mixed to 64 bits and these are summed, so that neither
    the order of tokens nor who routes them matters.
    """
    tokens = len(batch.tokens)
    total = torch.zeros((), dtype=torch.int64, device=model.embed.weight.device)
    if not tokens or not losses.choices:
        return total
    length = tokens // len(batch.samples)
    places = torch.arange(tokens)[model.rows(tokens)]
    samples = torch.tensor(batch.samples)[places // length]
    where = (samples * length + places % length).to(total.device).unsqueeze(1)
    for layer, experts in losses.choices.items():
        total += _mix(_mix(where + _salt(layer)) + experts).sum()
    return total


def as_text(total: Tensor) -> str:
    """16 hexadecimal digits."""
    return f"{int(total.item()) & (1 << 64) - 1:016x}"


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), with arithmetic shifts."""
    x = (x ^ (x >> 30)) * _MULTIPLIERS[0]
    x = (x ^ (x >> 27)) * _MULTIPLIERS[1]
    return x ^ (x >> 31)


def _salt(layer: str) -> int:
    return int.from_bytes(hashlib.blake2b(layer.encode(), digest_size=7).digest(), "little")
