"""Evaluation in bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.nn.context import Context
from weft.parallel.comm import Comm
from weft.parallel.together import on_every
from weft.train.objective import check_tokens, to_device


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats per token over ``tokens`` targets."""

    loss: float
    tokens: int

    def bits_per_byte(self, tokens: int, text_bytes: int) -> float | None:
        """Bits per byte of a split with ``tokens`` targets and ``text_bytes`` bytes; None without bytes.

        Exact when the evaluation read the whole split; otherwise the split's mean bytes per token are taken.
        """
        return self.loss * tokens / math.log(2) / text_bytes if text_bytes else None


@torch.no_grad()
def evaluate(model: HybridLM, batches: Iterable[Batch], comm: Comm, chunk: int) -> Evaluation:
    """Mean next-token loss over the batches of all ranks; ``chunk`` tokens have logits at a time.

    Raises:
        DataError: on every rank, if the batches of one cannot be used.
    """
    device = model.embed.weight.device

    def share() -> list[float]:
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            check_tokens(batch, model.config.vocab_size)
            tokens, future, mask, segments = to_device(batch, device)
            hidden = model.hidden(tokens, Context(segments))
            targets = future[0].masked_fill(~mask[0], -1)
            sums[0] += model.head.loss(hidden, model.head.weight, targets, 1.0, chunk)
            sums[1] += batch.targets[0]
        return sums.tolist()

    nats, count = (sum(part) for part in zip(*on_every(comm, share), strict=True))
    return Evaluation(nats / max(1.0, count), int(count))
