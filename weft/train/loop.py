"""The training step, and the loop around it."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from weft.config.errors import RunError
from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.parallel.flat import Stored
from weft.parallel.mesh import Mesh
from weft.parallel.store import Store
from weft.plan.box import Box
from weft.plan.shard import share
from weft.spec.count import mean_context, training_flops_per_token
from weft.spec.run import RunConfig
from weft.train.memory import peak_memory
from weft.train.objective import PARTS, Totals, objective, take, to_device, who_read
from weft.train.optimizer import Optimizer, RouterLoad, load_row
from weft.train.routing import as_text, routing_hash
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


class NotFinite(RunError):
    """A loss or gradient that is not finite; ``row`` is the row of that step, for ``metrics.jsonl``."""

    def __init__(self, message: str, row: dict[str, Any]) -> None:
        super().__init__(message)
        self.row = row


class Trainer:
    """Model, store, optimizer and data of one run on one rank."""

    def __init__(self, config: RunConfig, model: HybridLM, loader: Samples, mesh: Mesh) -> None:
        self.config, self.model, self.loader = config, model, loader
        self.mesh, self.comm = mesh, mesh.comm
        model.set_recompute(config.train.recompute)
        self.store = Store(model, config.model.params(), config.train.precision, mesh)
        self.optimizer = Optimizer(self.store, config.optimizer)
        self.load = RouterLoad(model)
        self.samples = self.tokens = 0
        self.seconds = 0.0
        self._read = 0  # tokens of the steps of this process, and the keys that they saw
        self._keys = 0.0

    def batches(self, samples: int) -> list[Batch]:
        """This rank's microbatches of the global batch that starts after ``samples`` samples.

        The batch is cut into parts that all readers compute at the same time, and each part into their
        shares, which differ by at most one sample and may be empty. So the samples that are computed together
        depend on the number of parts only, not on the layout.
        """
        train, readers = self.config.train, self.mesh.layout.readers
        together = min(train.micro_batch_size * readers, train.global_batch_size)
        parts = -(-train.global_batch_size // together)
        cuts = (share(train.global_batch_size, parts, i) for i in range(parts))
        mine = ((cut, share(len(cut), readers, self.mesh.reader)) for cut in cuts)
        return [self.loader.microbatch(samples + cut.start + own.start, len(own)) for cut, own in mine]

    @property
    def _full(self) -> tuple[int, ...]:
        """Tokens of each sample of the largest microbatch."""
        train = self.config.train
        share = -(-train.global_batch_size // self.mesh.layout.readers)
        return (self.config.data.seq_length,) * min(train.micro_batch_size, share)

    @property
    def flops_per_token(self) -> float:
        """Arithmetic of a token, mean over the steps so far; of whole windows before the first one."""
        context = self._keys / self._read if self._read else mean_context((self.config.data.seq_length,))
        return training_flops_per_token(self.config.model, context)

    def next_step(self, iteration: int, steps: Iterator[Iterable[Batch]]) -> dict[str, Any]:
        """``step`` on the next item of ``steps``, waited for and counted as part of the step."""
        return self.step(iteration, chain.from_iterable(islice(steps, 1)))

    def step(self, iteration: int, batches: Iterable[Batch]) -> dict[str, Any]:
        """One optimizer step (``iteration`` counts from 1); the row for ``metrics.jsonl``.

        What goes wrong with the data of one rank, also while ``batches`` is read, is one error on all ranks.

        Raises:
            NotFinite: a loss or gradient that is not finite; nothing has been updated then.
            DataError: every label masked, a token id outside the vocabulary, or data that cannot be read.
        """
        began = time.perf_counter()
        config = self.config
        taken, totals = take(batches, config.model.vocab_size, self.comm, self.mesh.leads)
        local, entropies, routing = self._backward(taken, totals)
        self.store.reduce()
        parts = self.comm.all_reduce(local.clone())
        norm = self.store.norm()
        values: dict[str, Any] = dict(zip(PARTS, parts.tolist(), strict=True))
        if entropies:
            spread = self.comm.all_reduce(torch.stack(list(entropies.values()))).tolist()
            values["router_entropy"] = dict(zip(entropies, spread, strict=True))
            values["routing_hash"] = as_text(self.comm.all_reduce(routing))
        row = {"step": iteration, "loss": self._total(values), **values, "grad_norm": norm.item()}
        row["lr"] = learning_rate(iteration, config.optimizer, config.scheduler, config.train.train_iters)
        self._refuse_nan(row, taken, local)
        self.optimizer.clip(norm)
        self.optimizer.step(row["lr"])
        counts = self.load.finish(self.comm, config.model.router_bias_update_rate)
        dropped = self.load.dropped if config.model.moe_capacity_factor else None
        return row | self._progress(totals, began) | load_row(counts, dropped)

    def _backward(self, batches: Sequence[Batch], totals: Totals) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Gradients of this rank's microbatches; its PARTS, the entropy of each router, the routing hash."""
        self.store.zero_grad()
        entropies: dict[str, Tensor] = {}
        tally: dict[str, Tensor] = {}  # choices of experts in this step, of all ranks
        device = self.model.embed.weight.device
        parts = torch.zeros(len(PARTS), dtype=self.store.master_dtype, device=device)
        routing = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            run = to_device(batch, device, self.mesh)
            known = {"seed": self.config.run.seed, "tally": tally, "full": self._full}
            loss, own, losses = objective(self.model, run, totals, self.config.train.loss_chunk, **known)
            loss.backward()
            self.store.end_microbatch()
            parts += own
            routing += routing_hash(self.model, run, losses)
            for key, router in losses.stats.items():
                self.load.add(key, router.counts, router.drop)
                entropies[key] = entropies.get(key, 0) + router.entropy / totals.tokens
        return parts, entropies, routing

    def _progress(self, totals: Totals, began: float) -> dict[str, Any]:
        """Add the step to what has been done; the part of the row that tells it."""
        device = self.model.embed.weight.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the step ends when its work has, not when it is queued
        seconds = time.perf_counter() - began
        self.samples += self.config.train.global_batch_size
        self.tokens += totals.targets[0]
        self.seconds += seconds
        self._read += totals.tokens
        self._keys += totals.tokens * totals.context
        return {
            "tokens": self.tokens,
            "samples": self.samples,
            "seconds": self.seconds,
            "tokens_per_second": totals.tokens / seconds,
            "flops_per_token": training_flops_per_token(self.config.model, totals.context),
            "memory_gib": peak_memory(device),
        }

    def _total(self, parts: dict[str, Any]) -> float:
        scale = self.config.model.mtp_loss_scale
        return parts["lm_loss"] + scale * parts["mtp_loss"] + parts["aux_loss"] + parts["z_loss"]

    def _refuse_nan(self, row: dict[str, Any], batches: Sequence[Batch], local: Tensor) -> None:
        """Stop every rank; name the ranks whose own ``local`` PARTS are not finite, or all if none is so."""
        wrong = [name for name in (*PARTS, "grad_norm") if not math.isfinite(row[name])]
        routers = [unit for unit, nats in row.get("router_entropy", {}).items() if not math.isfinite(nats)]
        if wrong or routers:
            found = ", ".join(f"{name} = {row[name]}" for name in wrong)
            if routers:  # units are in the order of the forward pass
                found += f"{', ' * bool(wrong)}router logits of {routers[0]} are not finite"
            culprits = who_read(batches, self.comm, not local.isfinite().all().item())
            message = (
                f"step {row['step']}: {found} ({culprits}). Nothing was updated; the last checkpoint is "
                "intact. Lower optimizer.lr, lengthen scheduler.lr_warmup_iters, or look at these samples"
            )
            raise NotFinite(message, row)

    def pieces(self) -> Iterator[Stored]:
        """What this rank has of everything that a checkpoint holds, by checkpoint name, as views."""
        shards = self.store.pieces(lambda flat: flat.shard)
        yield from (replace(piece, name=f"model/{piece.name}") for piece in shards)
        for spec in self.config.model.params():
            if spec.buffer:  # whole and the same on every rank
                tensor, owned = self.model.get_buffer(spec.name), self.comm.rank == 0
                yield Stored(f"model/{spec.name}", tensor, Box.whole(spec.shape), spec.shape, owned)
        yield from self.optimizer.pieces()
