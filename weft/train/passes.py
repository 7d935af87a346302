"""Forward and backward passes of the stages that a rank has: what the actions of a schedule do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.parallel.executor import Made, Work
from weft.parallel.links import Links
from weft.parallel.mesh import Mesh
from weft.parallel.offload import storage
from weft.parallel.store import Store
from weft.plan.schedule import Action, Edge
from weft.plan.stages import Cut
from weft.plan.step import uncut
from weft.train.objective import Outcome, Run, Totals, stage_objective, to_device


@dataclass(frozen=True)
class Pipeline:
    """A model in stages, as one rank has it.

    Attributes:
        model: the units that are here.
        mesh: the rank's place.
        cut: the whole model in stages.
        links: to the stages of other pipeline ranks.
    """

    model: HybridLM
    mesh: Mesh
    cut: Cut
    links: Links

    @classmethod
    def of(cls, model: HybridLM, mesh: Mesh) -> "Pipeline":
        """As the plan cuts it; a collective call."""
        made = mesh.plan.cut or uncut(model.config, mesh.plan.schedule)
        here = (s for s in model.config.params() if mesh.has(s.name) and not s.buffer and not s.fp32)
        dtype = model.get_parameter(next(here).name).dtype
        links = Links(mesh, made.graph, model.config.hidden_size, dtype, model.device)
        return cls(model, mesh, made, links)


class Stages(Work):
    """The stages of one rank, and the microbatches that they read."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.model, self.mesh, self.links = pipeline.model, pipeline.mesh, pipeline.links
        self.pieces = {str(stage): piece for stage, piece in enumerate(pipeline.cut.pieces)}
        self.device = self.model.device
        self._batches: Sequence[Batch] = ()
        self._sizes: Sequence[Sequence[int]] = ()
        self._runs: dict[int, Run] = {}

    def read(self, batches: Sequence[Batch], sizes: Sequence[Sequence[int]] = ()) -> None:
        """Take the microbatches of the next list of actions.

        Args:
            batches: this rank's share of each.
            sizes: tokens of every sample of each, of all readers; where pipeline ranks differ in layout.
        """
        self._batches, self._sizes, self._runs = batches, sizes, {}

    def run(self, microbatch: int) -> Run:
        """A microbatch on the device."""
        if microbatch not in self._runs:
            self._runs[microbatch] = to_device(self._batches[microbatch], self.device, self.mesh)
        return self._runs[microbatch]

    def outputs(self, stage: str, x: Tensor | None) -> dict[Edge, Tensor]:
        """What a stage hands on."""
        edges = [edge for edge in self.links.graph.edges if edge.source == stage]
        return {edge: x for edge in edges if x is not None}

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        """The residual stream, or its gradient, to or from the next or previous pipeline rank."""
        sizes = self._sizes[action.microbatch] if self._sizes else ()
        tokens = sum(self._batches[action.microbatch].windows)
        return self.links.post(action, value, tokens, sizes)


class Training(Stages):
    """Losses and gradients of a step.

    Args:
        chunk: tokens whose logits exist at a time.
        noted: told of each forward pass: its tokens, and what the stage made of them.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        store: Store,
        chunk: int,
        noted: Callable[[Run, Outcome], None],
    ) -> None:
        super().__init__(pipeline)
        self.store, self.chunk, self.noted = store, chunk, noted
        self.totals = Totals((), 1, 0.0)
        self._known: dict[str, Any] = {}
        self._update: Callable[[], None] = lambda: None

    def begin(self, totals: Totals, update: Callable[[], None], **known: Any) -> None:
        """A step: counts of the global batch, what updates at its end, further fields of contexts."""
        self.totals, self._update, self._known = totals, update, known

    def forward(self, stage: str, microbatch: int, inputs: Mapping[Edge, Tensor]) -> Made:
        """One stage's part of the objective."""
        run, x = self.run(microbatch), next(iter(inputs.values()), None)
        made = stage_objective(self.model, self.pieces[stage], x, run, self.totals, self.chunk, **self._known)
        self.noted(run, made)
        return Made(self.outputs(stage, made.x), made.loss)

    def enter(self, key: tuple[str, int], late: bool) -> None:
        """Uses of units from here on are of this pass."""
        self.store.enter(key, late)

    def leave(self, key: tuple[str, int]) -> None:
        """What is left of its gradients is summed."""
        self.store.end_pass(key)

    def gather(self, stage: str) -> None:
        """All units of the stage."""
        self.store.hold(self._units(stage))

    def free(self, stage: str) -> None:
        """All units of the stage."""
        self.store.release(self._units(stage))

    def reduce(self, stage: str) -> None:
        """Where units have not done it in their passes."""
        self.store.reduce_stage(stage)

    def step(self) -> None:
        """What ``begin`` was given."""
        self._update()

    def parameters(self) -> frozenset[int]:
        """They rest with the store."""
        return frozenset(storage(param) for param in self.model.parameters())

    def _units(self, stage: str) -> list[str]:
        return [unit for unit in self.model.units() if self.pieces[stage].has(unit)]


class Reading(Stages):
    """Next-token losses without gradients, for evaluation."""

    def __init__(self, pipeline: Pipeline, chunk: int) -> None:
        super().__init__(pipeline)
        self.chunk = chunk
        self.nats = torch.zeros((), dtype=torch.float64, device=self.device)

    def forward(self, stage: str, microbatch: int, inputs: Mapping[Edge, Tensor]) -> Made:
        """One stage; the last one adds to ``nats``."""
        piece, run = self.pieces[stage], self.run(microbatch)
        ctx = self.model.context(run.segments)
        x = self.model.embed(run.tokens) if piece.first else next(iter(inputs.values()))
        x = self.model.through(x, piece.layers, ctx)
        if piece.last:
            targets = run.future[:1].masked_fill(~run.mask[:1], -1)
            self.nats += self.model.head([self.model.norm(x)], targets, [1.0], self.chunk)[0]
        return Made(self.outputs(stage, None if piece.last else x), None)
