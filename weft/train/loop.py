"""The training step, and the loop around it."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
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
from weft.plan.step import step_of
from weft.plan.timeline import Span
from weft.spec.count import mean_context, training_flops_per_token
from weft.spec.modules import DECODER
from weft.spec.precision import PRECISIONS
from weft.spec.run import RunConfig
from weft.train.ahead import Ahead
from weft.train.encode import Fetch, Inputs
from weft.train.memory import peak_memory
from weft.train.objective import PARTS, Outcome, Run, Taken, Totals, who_read
from weft.train.optimizer import Optimizer, RouterLoad, in_order, load_row
from weft.train.passes import Training
from weft.train.routing import as_text, routing_hash
from weft.train.schedule import learning_rate
from weft.train.team import Member, Team


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
    """Modules, stores, optimizers and data of one run on one rank.

    Args:
        config: of the run.
        team: what this rank has.
        loader: its samples; asked only where something of the decoder is.
        fetch: reads what encoders need; asked only where their first stages are.

    Attributes:
        stores: of the modules here of which something is trained.
        optimizers: likewise.
    """

    def __init__(self, config: RunConfig, team: Team, loader: Samples, fetch: Fetch | None = None) -> None:
        self.config, self.team, self.loader = config, team, loader
        self.comm = team.comm
        self.stores: dict[str, Store] = {}
        for name, member in team.members.items():
            member.model.set_recompute(config.train.recompute)
            trained = [s for s in member.module.params if member.module.trains(s.name) and not s.buffer]
            if any(member.mesh.has(spec.name) for spec in trained):
                self.stores[name] = Store(member.model, trained, config.train.precision, member.mesh)
        self.optimizers = {name: Optimizer(store, config.optimizer) for name, store in self.stores.items()}
        self.device = team.device
        self.load = RouterLoad(team.lm, self.device)
        schedule, _ = step_of(team.plans, team.modules, config.plan.schedule, self.microbatches)
        self._passes = Training(team, schedule.graph, self.stores, config.train.loss_chunk, self._note)
        self.executor = Executor(schedule, team.seat, self._passes, self.device)
        for member in team.members.values() if self.executor.splits else ():
            attach(member.model, self.executor.late)
        self.spans: list[Span] = []  # of the last step, on this rank
        self.ahead = Ahead(team, schedule.graph, config.model.vocab_size, fetch)
        self._routers = Union(self.comm)
        self.samples = self.tokens = 0
        self.seconds = 0.0
        self._steps = 0
        self._read = 0  # tokens of the steps of this process, and the keys that they saw
        self._keys = self._media = 0.0  # and FLOPs of encoders
        self._master: torch.dtype = getattr(torch, PRECISIONS[config.train.precision].master)

    @property
    def model(self) -> HybridLM:
        """The decoder, of which something must be here."""
        assert self.team.lm is not None  # noqa: S101 - for ranks that have it
        return self.team.lm

    @property
    def mesh(self) -> Mesh:
        """The decoder's, of which something must be here."""
        return self.team.members[DECODER].mesh

    @property
    def store(self) -> Store:
        """The decoder's, which must be trained."""
        return self.stores[DECODER]

    @property
    def optimizer(self) -> Optimizer:
        """The decoder's, which must be trained."""
        return self.optimizers[DECODER]

    @property
    def microbatches(self) -> int:
        """Of a step."""
        return self.team.plans.decoder.microbatches(self.config.train)

    @property
    def steps(self) -> int:
        """Updates so far (the bias correction's exponent)."""
        return self._steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps = value
        for optimizer in self.optimizers.values():
            optimizer.steps = value

    def batches(self, samples: int) -> list[Batch]:
        """This rank's microbatches of the global batch that starts after ``samples`` samples.

        The batch is cut into microbatches that all readers compute at the same time, and each into their
        shares, which differ by at most one sample and may be empty. So the samples that are computed together
        depend on the number of microbatches only, not on the layout. A rank without the decoder has none.
        """
        if self.team.decoder is None:
            return []
        readers, parts = self.mesh.layout.readers, self.microbatches
        cuts = (share(self.config.train.global_batch_size, parts, i) for i in range(parts))
        mine = ((cut, share(len(cut), readers, self.mesh.reader)) for cut in cuts)
        return [self.loader.microbatch(samples + cut.start + own.start, len(own)) for cut, own in mine]

    @property
    def _full(self) -> tuple[int, ...]:
        """Tokens of each sample of the largest microbatch, where those of all samples are known."""
        if self.team.decoder is None or self.team.modules.encoders:
            return ()
        most = -(-self.mesh.whole.together(self.config.train) // self.mesh.layout.readers)
        return (self.config.data.seq_length,) * most

    @property
    def flops_per_token(self) -> float:
        """Arithmetic of a token, mean over the steps so far; of whole windows before the first one."""
        context = self._keys / self._read if self._read else mean_context((self.config.data.seq_length,))
        return training_flops_per_token(self.config.model, context) + self._media / max(1, self._read)

    def _encoding(self, inputs: Inputs) -> float:
        """Arithmetic of all encoders' layers in a step; a backward pass counts as two forward passes."""
        return sum(
            (1.0 if self.team.modules.all[name].frozen else 3.0)
            * sum(map(group.config.flops, group.sequences.rows))
            for (name, _), group in inputs.groups.items()
        )

    def next_step(self, iteration: int, steps: Iterator[Iterable[Batch]]) -> dict[str, Any]:
        """``step`` on the next item of ``steps``, waited for and counted as part of the step."""
        return self._step(iteration, steps, more=True)

    def step(self, iteration: int, batches: Iterable[Batch]) -> dict[str, Any]:
        """One optimizer step (``iteration`` counts from 1); the row for ``metrics.jsonl``.

        What goes wrong with the data of one rank, also while ``batches`` is read, is one error on all ranks.

        Raises:
            NotFinite: a loss or gradient that is not finite; nothing has been updated then.
            DataError: every label masked, a token id outside the vocabulary, or data that cannot be read.
        """
        return self._step(iteration, iter([batches]), more=False)

    def _step(self, iteration: int, steps: Iterator[Iterable[Batch]], more: bool) -> dict[str, Any]:
        began = time.perf_counter()
        taken, inputs = self.ahead.next(steps, more)
        self._sums = _Sums(torch.zeros(len(PARTS), dtype=self._master, device=self.device))
        row: dict[str, Any] = {}
        known = {"seed": self.config.run.seed, "tally": {}, "full": self._full}
        self._passes.read(taken.batches, taken.tables, inputs)
        self._passes.begin(taken.totals, lambda: row.update(self._update(iteration, taken)), **known)
        for store in self.stores.values():
            store.zero_grad()
        self.spans = self.executor.run()
        return row | self._progress(taken.totals, self._encoding(inputs), began) | self._loads

    def _note(self, run: Run, made: Outcome) -> None:
        """What one stage made of a microbatch."""
        self._sums.parts += made.parts
        self._sums.routing += routing_hash(self.model, run, made.reported)
        for key, router in made.reported.stats.items():
            self.load.add(key, router.counts, router.drop)
            before = self._sums.entropies.get(key, 0)
            self._sums.entropies[key] = before + router.entropy / self._passes.totals.tokens

    def _update(self, iteration: int, taken: Taken) -> dict[str, Any]:
        """After the last pass: gradients, what the step reports, and the optimizers."""
        config = self.config
        for store in self.stores.values():
            store.reduce()
        parts = self.comm.all_reduce(self._sums.parts.clone())
        squares = sum((store.squares() for store in self.stores.values()), start=parts.new_zeros(()))
        norm = self.comm.all_reduce(squares.double()).sqrt().to(self._master)
        values: dict[str, Any] = dict(zip(PARTS, parts.tolist(), strict=True))
        values |= self._routing()
        row = {"step": iteration, "loss": self._total(values), **values, "grad_norm": norm.item()}
        row["lr"] = learning_rate(iteration, config.optimizer, config.scheduler, config.train.train_iters)
        self._refuse_nan(row, taken.batches, self._sums.parts)
        for optimizer in self.optimizers.values():
            optimizer.clip(norm)
            optimizer.step(row["lr"])
        self._steps += 1
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

    def _progress(self, totals: Totals, media: float, began: float) -> dict[str, Any]:
        """Add the step to what has been done; the row that tells it. ``media``: encoders' FLOPs."""
        device = self.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the step ends when its work has, not when it is queued
        seconds = time.perf_counter() - began
        self.samples += self.config.train.global_batch_size
        self.tokens += totals.targets[0]
        self.seconds += seconds
        self._read += totals.tokens
        self._media += media
        self._keys += totals.tokens * totals.context
        return {
            "tokens": self.tokens,
            "samples": self.samples,
            "seconds": self.seconds,
            "tokens_per_second": totals.tokens / seconds,
            "flops_per_token": training_flops_per_token(self.config.model, totals.context)
            + media / totals.tokens,
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

    def adopt(self) -> None:
        """Begin from the values that were written to what ``pieces`` gave of the model."""
        for store in self.stores.values():
            store.adopt()

    def publish(self) -> None:
        """Go on from master values that were written."""
        for store in self.stores.values():
            store.publish()

    def pieces(self) -> Iterator[Stored]:
        """What this rank has of everything that a checkpoint holds, by checkpoint name, as views."""
        for name, member in self.team.members.items():
            full = member.module.full
            if name in self.stores:
                shards = self.stores[name].pieces(lambda flat: flat.shard)
                yield from (replace(piece, name=f"model/{full(piece.name)}") for piece in shards)
            yield from (replace(piece, name=f"model/{full(piece.name)}") for piece in resting(member))
            if name in self.optimizers:
                yield from self.optimizers[name].pieces(full)


def resting(member: Member) -> Iterator[Stored]:
    """What a rank has of a module that no optimizer changes, under the module's own names."""
    for spec in member.module.params:
        if not member.mesh.has(spec.name) or (member.module.trains(spec.name) and not spec.buffer):
            continue
        path, _, name = spec.name.rpartition(".")
        tensor = getattr(member.model.get_submodule(path), name).detach()
        for held in member.mesh.held(spec):
            view = tensor[held.local.within(Box.whole(tuple(tensor.shape)))]
            owned = member.mesh.rank == min(member.mesh.holders(spec, held))
            yield Stored(spec.name, view, held.box, spec.shape, owned)
