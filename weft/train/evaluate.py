"""Evaluation in bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from weft.data.batch import Batch, empty
from weft.models.hybrid import HybridLM
from weft.parallel.mesh import Mesh
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
def evaluate(model: HybridLM, batches: Iterable[Batch], mesh: Mesh, chunk: int) -> Evaluation:
    """Mean next-token loss over the batches of all readers; ``chunk`` tokens have logits at a time.

    Readers may have different numbers of batches: who has none left goes on with empty ones.

    Raises:
        DataError: on every rank, if the batches of one cannot be used.
    """
    device, mine = model.embed.weight.device, iter(batches)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    read: list[Batch] = []

    def take() -> bool:
        read[:] = [batch for batch in (next(mine, None),) if batch is not None]
        for batch in read:
            check_tokens(batch, model.config.vocab_size)
        return bool(read)

    while any(on_every(mesh.comm, take)):
        batch = read[0] if read else empty(1)
        run = to_device(batch, device, mesh)
        hidden = model.hidden(run.tokens, model.context(run.segments))
        targets = run.future[:1].masked_fill(~run.mask[:1], -1)
        sums[0] += model.head([hidden], targets, [1.0], chunk)[0]
        sums[1] += batch.targets[0] * mesh.leads
    nats, count = mesh.comm.all_reduce(sums).tolist()
    return Evaluation(nats / max(1.0, count), int(count))
