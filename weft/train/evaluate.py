"""Evaluation in bits per byte."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, zip_longest

import torch

from weft.data.batch import Batch, empty
from weft.models.hybrid import HybridLM
from weft.parallel.executor import Executor
from weft.parallel.mesh import Mesh
from weft.parallel.together import on_every
from weft.plan.placing import forward_only
from weft.train.objective import check_tokens
from weft.train.passes import Pipeline, Reading


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
    work, mine = Reading(Pipeline.of(model, mesh), chunk), iter(batches)
    schedule = forward_only(work.links.graph, work.links.graph.ranks)
    executor = Executor(schedule, mesh.position, work, model.device)
    tokens, read = 0, list[Batch]()

    def take() -> list[list[int]]:
        read[:] = islice(mine, schedule.microbatches)
        for batch in read:
            check_tokens(batch, model.config.vocab_size)
        return [list(batch.windows) for batch in read] if mesh.leads else [[]] * len(read)

    while any(everyone := on_every(mesh.comm, take)):
        batch = [*read, *(empty(1) for _ in range(schedule.microbatches - len(read)))]
        parts = zip_longest(*everyone, range(schedule.microbatches), fillvalue=[])
        work.read(batch, [[size for own in part[:-1] for size in own] for part in parts])
        executor.run()
        tokens += sum(each.targets[0] for each in read) * mesh.leads
    sums = torch.stack([work.nats, work.nats.new_tensor(tokens)])
    nats, count = mesh.comm.all_reduce(sums).tolist()
    return Evaluation(nats / max(1.0, count), int(count))
