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
from weft.ops.late import attach
from weft.parallel.executor import Executor
from weft.parallel.flat import Stored
from weft.parallel.mesh import Mesh
from weft.parallel.store import Store
from weft.parallel.together import Union
from weft.plan.box import Box
from weft.plan.shard import share
from weft.plan.step import schedule_of
from weft.plan.timeline import Span
from weft.spec.count import mean_context, training_flops_per_token
from weft.spec.run import RunConfig
from weft.train.memory import peak_memory
from weft.train.objective import PARTS, Outcome, Run, Totals, take, who_read
from weft.train.optimizer import Optimizer, RouterLoad, in_order, load_row
from weft.train.passes import Pipeline, Training
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


class _Sums:
    """Of this rank's passes in a step.

    Attributes:
        parts: its PARTS.
        entropies: of each router.
        routing: the hash of its choices.
    """

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts
        self.entropies: dict[str, Tensor] = {}
        self.routing = torch.zeros((), dtype=torch.int64, device=parts.device)


class Trainer:
    """Model, store, optimizer and data of one run on one rank."""

    def __init__(self, config: RunConfig, model: HybridLM, loader: Samples, mesh: Mesh) -> None:
        self.config, self.model, self.loader = config, model, loader
        self.mesh, self.comm = mesh, mesh.comm
        model.set_recompute(config.train.recompute)
        self.store = Store(model, config.model.params(), config.train.precision, mesh)
        self.optimizer = Optimizer(self.store, config.optimizer)
        self.load = RouterLoad(model)
        self.pipeline = Pipeline.of(model, mesh)
        self._passes = Training(self.pipeline, self.store, config.train.loss_chunk, self._note)
        schedule, _ = schedule_of(
            config.plan.schedule,
            self.pipeline.cut,
            mesh.whole.microbatches(config.train),
            self.store.level,
        )
        self.executor = Executor(schedule, mesh.position, self._passes, model.device)
        if self.executor.splits:
            attach(model, self.executor.late)
        self.spans: list[Span] = []  # of the last step, on this rank
        self._routers = Union(self.comm)
        self.samples = self.tokens = 0
        self.seconds = 0.0
        self._read = 0  # tokens of the steps of this process, and the keys that they saw
        self._keys = 0.0

    def batches(self, samples: int) -> list[Batch]:
        """This rank's microbatches of the global batch that starts after ``samples`` samples.

        The batch is cut into microbatches that all readers compute at the same time, and each into their
        shares, which differ by at most one sample and may be empty. So the samples that are computed together
        depend on the number of microbatches only, not on the layout.
        """
        train, readers = self.config.train, self.mesh.layout.readers
        parts = self.mesh.whole.microbatches(train)
        cuts = (share(train.global_batch_size, parts, i) for i in range(parts))
        mine = ((cut, share(len(cut), readers, self.mesh.reader)) for cut in cuts)
        return [self.loader.microbatch(samples + cut.start + own.start, len(own)) for cut, own in mine]

    @property
    def _full(self) -> tuple[int, ...]:
        """Tokens of each sample of the largest microbatch."""
        most = -(-self.mesh.whole.together(self.config.train) // self.mesh.layout.readers)
        return (self.config.data.seq_length,) * most

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
        taken, totals, sizes = take(batches, self.config.model.vocab_size, self.comm, self.mesh)
        self._sums = _Sums(torch.zeros(len(PARTS), dtype=self.store.master_dtype, device=self.model.device))
        row: dict[str, Any] = {}
        known = {"seed": self.config.run.seed, "tally": {}, "full": self._full}
        self._passes.read(taken, sizes)
        self._passes.begin(totals, lambda: row.update(self._update(iteration, totals, taken)), **known)
        self.store.zero_grad()
        self.spans = self.executor.run()
        return row | self._progress(totals, began) | self._loads

    def _note(self, run: Run, made: Outcome) -> None:
        """What one stage made of a microbatch."""
        self._sums.parts += made.parts
        self._sums.routing += routing_hash(self.model, run, made.reported)
        for key, router in made.reported.stats.items():
            self.load.add(key, router.counts, router.drop)
            before = self._sums.entropies.get(key, 0)
            self._sums.entropies[key] = before + router.entropy / self._passes.totals.tokens

    def _update(self, iteration: int, totals: Totals, taken: Sequence[Batch]) -> dict[str, Any]:
        """After the last pass: gradients, what the step reports, and the optimizer."""
        config = self.config
        self.store.reduce()
        parts = self.comm.all_reduce(self._sums.parts.clone())
        norm = self.store.norm()
        values: dict[str, Any] = dict(zip(PARTS, parts.tolist(), strict=True))
        values |= self._routing()
        row = {"step": iteration, "loss": self._total(values), **values, "grad_norm": norm.item()}
        row["lr"] = learning_rate(iteration, config.optimizer, config.scheduler, config.train.train_iters)
        self._refuse_nan(row, taken, self._sums.parts)
        self.optimizer.clip(norm)
        self.optimizer.step(row["lr"])
        counts = self.load.finish(self.comm, config.model.router_bias_update_rate)
        self._loads = load_row(counts, self.load.dropped if config.model.moe_capacity_factor else None)
        return row

    def _routing(self) -> dict[str, Any]:
        """Entropy of the routers of all pipeline ranks, in the model's order, and the hash of choices."""
        mine = self._sums.entropies
        names = sorted(self._routers.of(dict.fromkeys(mine, 1)), key=in_order)
        if not names:
            return {}
        none = self._sums.parts.new_zeros(())
        spread = self.comm.all_reduce(torch.stack([mine.get(name, none) for name in names])).tolist()
        hashed = as_text(self.comm.all_reduce(self._sums.routing))
        return {"router_entropy": dict(zip(names, spread, strict=True)), "routing_hash": hashed}

    def _progress(self, totals: Totals, began: float) -> dict[str, Any]:
        """Add the step to what has been done; the part of the row that tells it."""
        device = self.model.device
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
            if spec.buffer and self.mesh.has(spec.name):  # whole and the same on every rank of a stage
                tensor, owned = self.model.get_buffer(spec.name), self.mesh.first
                yield Stored(f"model/{spec.name}", tensor, Box.whole(spec.shape), spec.shape, owned)
        yield from self.optimizer.pieces()
