"""The training step, and the loop around it."""

import math
import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from weft.config.errors import RunError
from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.parallel.comm import Comm
from weft.parallel.store import Store
from weft.spec.run import RunConfig
from weft.train.memory import peak_memory
from weft.train.objective import PARTS, count, objective
from weft.train.optimizer import Optimizer, RouterLoad
from weft.train.schedule import learning_rate


@runtime_checkable
class Samples(Protocol):
    """Where microbatches come from (``weft.data.order.Loader``)."""

    def microbatch(self, start: int, count: int) -> Batch:
        """Samples ``start`` to ``start + count - 1`` of the run."""
        ...

    def state(self, samples: int) -> dict[str, Any]:
        """The data position after ``samples`` samples, as JSON values."""
        ...


class Trainer:
    """Model, store, optimizer and data of one run on one rank."""

    def __init__(self, config: RunConfig, model: HybridLM, loader: Samples, comm: Comm) -> None:
        self.config, self.model, self.loader, self.comm = config, model, loader, comm
        model.set_recompute(config.train.recompute)
        self.store = Store(model, config.model.params(), config.train.precision)
        self.optimizer = Optimizer(self.store, config.optimizer)
        self.load = RouterLoad(model)
        self.samples = self.tokens = 0
        self.seconds = 0.0

    def batches(self, samples: int) -> list[Batch]:
        """This rank's microbatches of the global batch that starts after ``samples`` samples."""
        train, comm = self.config.train, self.comm
        share = train.global_batch_size // comm.size
        first = samples + comm.rank * share
        return [
            self.loader.microbatch(start, train.micro_batch_size)
            for start in range(first, first + share, train.micro_batch_size)
        ]

    def step(self, iteration: int, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step (``iteration`` counts from 1); the row for ``metrics.jsonl``.

        Raises:
            RunError: a loss or gradient that is not finite; nothing has been updated then.
            DataError: every label masked, or a token id outside the vocabulary.
        """
        began = time.perf_counter()
        config = self.config
        totals = count(batches, self.comm)
        self.store.zero_grad()
        entropies: dict[str, Tensor] = {}
        parts = torch.zeros(len(PARTS), dtype=self.store.master_dtype, device=self.model.embed.weight.device)
        for batch in batches:
            loss, share, stats = objective(self.model, batch, totals, config.train.loss_chunk)
            loss.backward()
            parts += share
            for key, router in stats.items():
                self.load.add(key, router.counts)
                entropies[key] = entropies.get(key, 0) + router.entropy / totals.tokens
        self.store.reduce(self.comm)
        self.comm.all_reduce(parts)
        norm = self.store.norm()
        values: dict[str, Any] = dict(zip(PARTS, parts.tolist(), strict=True))
        if entropies:
            spread = self.comm.all_reduce(torch.stack(list(entropies.values()))).tolist()
            values["router_entropy"] = dict(zip(entropies, spread, strict=True))
        row = {"step": iteration, "loss": self._total(values), **values, "grad_norm": norm.item()}
        self._refuse_nan(row, batches)
        self.optimizer.clip(norm)
        row["lr"] = learning_rate(iteration, config.optimizer, config.scheduler, config.train.train_iters)
        self.optimizer.step(row["lr"])
        counts = self.load.finish(self.comm, config.model.router_bias_update_rate)
        self.samples += config.train.global_batch_size
        self.tokens += totals.targets[0]
        seconds = time.perf_counter() - began
        self.seconds += seconds
        row |= {"tokens": self.tokens, "samples": self.samples, "seconds": self.seconds}
        row |= {"tokens_per_second": totals.tokens / seconds, "memory_gib": peak_memory(parts.device)}
        return row | _load_row(counts)

    def _total(self, parts: dict[str, Any]) -> float:
        scale = self.config.model.mtp_loss_scale
        return parts["lm_loss"] + scale * parts["mtp_loss"] + parts["aux_loss"] + parts["z_loss"]

    def _refuse_nan(self, row: dict[str, Any], batches: Sequence[Batch]) -> None:
        wrong = [name for name in (*PARTS, "grad_norm") if not math.isfinite(row[name])]
        if wrong:
            samples = [s for batch in batches for s in batch.samples]
            found = ", ".join(f"{name} = {row[name]}" for name in wrong)
            raise RunError(
                f"step {row['step']}: {found} (rank {self.comm.rank} read samples {samples}). Nothing was "
                "updated; the last checkpoint is intact. Lower optimizer.lr, lengthen "
                "scheduler.lr_warmup_iters, or look at these samples"
            )

    def tensors(self, model_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name."""
        named = {f"model/{name}": tensor for name, tensor in model_tensors.items()}
        return named | self.optimizer.tensors()


def _load_row(counts: dict[str, Tensor]) -> dict[str, Any]:
    if not counts:
        return {}
    shares = {name: (c / c.sum().clamp_min(1)).tolist() for name, c in counts.items()}
    worst = max(max(share) * len(share) for share in shares.values())
    return {"expert_load_max": worst, "expert_load": {n: [round(s, 6) for s in v] for n, v in shares.items()}}
