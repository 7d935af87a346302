"""What training minimizes: next token, MTP depths, router balance, as SUMs over the global batch.

    loss = sum CE_0 / N_0 + (scale / D) * sum_k (sum CE_k / N_k) + (balance + z) / tokens

N_k is the number of targets of depth k in the whole global batch, known before the forward pass,
so microbatches and ranks only ever add (the design, law 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weft.config.errors import DataError
from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.nn.context import RouterStats
from weft.ops.segments import Segments
from weft.parallel.comm import Comm

PARTS = ("lm_loss", "mtp_loss", "aux_loss", "z_loss")


@dataclass(frozen=True)
class Totals:
    """Counts of the global batch: targets per depth (the next token first), and all tokens."""

    targets: tuple[int, ...]
    tokens: int


def count(batches: Sequence[Batch], comm: Comm) -> Totals:
    """Counts over all microbatches and ranks.

    Raises:
        DataError: no target is left in the global batch (every label is masked).
    """
    mine = [np.array([*batch.targets, len(batch.tokens)]) for batch in batches]
    everyone = np.sum(comm.gather_objects(np.sum(mine, axis=0).tolist()), axis=0).tolist()
    if everyone[0] == 0:
        samples = ", ".join(str(s) for batch in batches for s in batch.samples)
        raise DataError(
            f"all {everyone[-1]} labels of the global batch are masked (samples {samples}): nothing to learn "
            "from; check the loss mask of the data"
        )
    return Totals(tuple(everyone[:-1]), everyone[-1])


def to_device(batch: Batch, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Tokens, future, mask and segments as tensors.

    Raises:
        DataError: a token id that the model's vocabulary does not have.
    """
    largest = max(int(batch.tokens.max()), int(batch.future.max()))
    if largest >= vocab or int(batch.tokens.min()) < 0:
        wrong = largest if largest >= vocab else int(batch.tokens.min())
        raise DataError(
            f"token id {wrong} (samples {list(batch.samples)}) is outside the model's vocabulary of {vocab}; "
            "use the tokenizer of this model or raise model.vocab_size"
        )
    arrays = (batch.tokens, batch.future, batch.mask)
    tokens, future, mask = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
    return tokens, future, mask, Segments(batch.lengths)


def objective(
    model: HybridLM, batch: Batch, totals: Totals, chunk: int
) -> tuple[Tensor, Tensor, dict[str, RouterStats]]:
    """One microbatch's share of the loss, its PARTS (detached), and router statistics."""
    device = model.embed.weight.device
    tokens, future, mask, segments = to_device(batch, model.config.vocab_size, device)
    scales = [1.0 / max(1, n) for n in totals.targets]
    losses = model.losses(tokens, future, mask, segments, scales, chunk)
    stats = losses.stats.values()
    zero = losses.lm.new_zeros(())
    mtp = sum(losses.mtp, start=zero) / max(1, len(losses.mtp))
    balance = sum((s.balance for s in stats), start=zero) / totals.tokens
    z = sum((s.z for s in stats), start=zero) / totals.tokens
    loss = losses.lm + model.config.mtp_loss_scale * mtp + balance + z
    parts = torch.stack([losses.lm.detach(), mtp.detach(), balance.detach(), z.detach()])
    return loss, parts, losses.stats
