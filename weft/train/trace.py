"""What the ranks of a plan compute for one batch, each tensor in the coordinates of one process.

Ranks run as threads of this process. Hooks of modules and tensors take the activations between slots and the
gradients that arrive at them; the names of dimensions say where they belong (``weft.plan.shard``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from weft.build.model import assemble
from weft.data.batch import Batch, join
from weft.models.hybrid import HybridLM, MTPDepth
from weft.nn.block import Block
from weft.nn.linear import RMSNorm
from weft.nn.slots import ConvScan, Enter, Leave, Lookup, Product, Scan
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.executor import Executor, Made
from weft.parallel.mesh import Mesh, mesh_of
from weft.parallel.threads import run_threads
from weft.plan.boundary import Table
from weft.plan.placing import complete
from weft.plan.schedule import Action, Graph, Schedule
from weft.plan.shard import share
from weft.plan.stages import Piece as Stage
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import PlanConfig
from weft.spec.param import Dim, ParamSpec, dim
from weft.train.objective import PARTS, Totals, count, stage_objective
from weft.train.passes import Stages, Values
from weft.train.team import Team, decoder_only

Name = tuple[str, str]
"""A unit (``layers.3``) and a tensor inside it (``mixer.in_proj``)."""
CHOICES = "router choices"
PATIENCE = 600.0  # seconds that a rank waits for the others


@dataclass(frozen=True)
class Piece:
    """The part of one global matrix that a rank has.

    Attributes:
        rank: the rank.
        rows: its global rows (tokens of the global batch).
        columns: its global columns (features).
        value: the elements, in fp64.
        stage: of the pipeline, in which the rank has it.
    """

    rank: int
    rows: Int64[Tensor, " rows"]
    columns: Int64[Tensor, " columns"]
    value: Float[Tensor, "rows columns"]
    stage: int = 0


Pieces = Mapping[Name, Sequence[Piece]]


@dataclass(frozen=True)
class Trace:
    """All ranks' pieces, in order of execution.

    Attributes:
        weights: parameters and buffers before the step.
        forward: outputs of units and of the slots and norms inside them.
        losses: parts of the loss; ranks have summands.
        backward: gradients that arrive at the tensors of ``forward``; ranks have summands.
        gradients: of parameters; ranks have summands.
    """

    weights: Pieces
    forward: Pieces
    losses: Pieces
    backward: Pieces
    gradients: Pieces


@dataclass(frozen=True)
class Step:
    """A freshly initialized model and the batch it reads.

    Attributes:
        samples: the global batch, one ``Batch`` per sample.
        chunk: tokens whose logits exist at a time.
    """

    model: HybridConfig
    samples: Sequence[Batch]
    precision: str = "fp64"
    seed: int = 0
    chunk: int = 1024


def run_plan(plan: PlanConfig, ranks: int, step: Step) -> Trace:
    """One forward and backward pass of all ranks of a plan, each reader with its share of the samples.

    Raises:
        ConfigError: sizes that do not fill the ranks.
    """
    totals = count([join(step.samples)], SingleComm())
    sizes = sorted((len(sample.tokens) for sample in step.samples), reverse=True)

    def work(comm: Comm) -> list[dict[Name, Piece]]:
        mesh = mesh_of(plan, comm, step.model)
        model = assemble(step.model, step.precision, torch.device("cpu"), step.seed, mesh)
        mine = share(len(step.samples), mesh.layout.readers, mesh.reader)
        batch = join(step.samples[mine.start : mine.stop])
        full = tuple(sizes[: len(share(len(sizes), mesh.layout.readers, 0))])
        before = sum(len(sample.tokens) for sample in step.samples[: mine.start])
        team = decoder_only(model, mesh)
        work_here = _Once(team, totals, step, full)
        work_here.read([batch], [Table(tuple(len(sample.tokens) for sample in step.samples))])
        run = work_here.run(0)
        weights = _parameters(model, mesh, lambda tensor: tensor)
        recorder = _Recorder(model, mesh, len(run.tokens), before + run.segments.start)
        work_here.recorder = recorder
        Executor(_once(team.cut.graph), mesh.position, work_here).run()
        losses = {
            ("head", name): _piece(mesh.rank, torch.arange(1), torch.arange(1), part)
            for name, part in zip(PARTS, work_here.parts, strict=True)
        }
        arrived = recorder.backward
        backward = {name: arrived[name] for name in recorder.forward if name in arrived}
        return [weights, recorder.forward, losses, backward, _parameters(model, mesh, _gradient)]

    results = run_threads(ranks, work, PATIENCE)
    return Trace(*(_joined(phase) for phase in zip(*results, strict=True)))


def _once(graph: Graph) -> Schedule:
    """One microbatch, forward and back."""
    stages = [graph.at(rank) for rank in range(graph.seats)]
    forward = [[Action("F", stage, 0) for stage in own] for own in stages]
    back = [[Action(op, stage, 0) for stage in reversed(own) for op in ("B", "W")] for own in stages]
    return complete(graph, tuple((*f, *b) for f, b in zip(forward, back, strict=True)))


class _Once(Stages):
    """One pass of one microbatch; gradients stay on each rank."""

    def __init__(self, team: Team, totals: Totals, step: Step, full: tuple[int, ...]) -> None:
        super().__init__(team, team.cut.graph)
        self.parts = torch.zeros(len(PARTS), dtype=torch.float64)
        self.recorder: _Recorder
        self._objective = partial(stage_objective, totals=totals, chunk=step.chunk, seed=step.seed, full=full)

    def forward(self, stage: str, index: int, inputs: Values) -> Made:
        self.recorder.stage = int(stage)
        return super().forward(stage, index, inputs)

    def decode(self, stage: str, piece: Stage, microbatch: int, x: Tensor | None) -> Made:
        assert self.team.lm is not None  # noqa: S101 - a stage of it runs
        made = self._objective(self.team.lm, piece, x, self.run(microbatch))
        self.parts += made.parts
        return Made(self.outputs(stage, made.x), made.loss)


def _joined(ranks: Sequence[Mapping[Name, Piece]]) -> Pieces:
    """Pieces of all ranks by name, in the order of the stages and of the first rank that has them."""
    names = dict.fromkeys(name for rank in ranks for name in rank)
    found = {name: [rank[name] for rank in ranks if name in rank] for name in names}
    return dict(sorted(found.items(), key=lambda pair: min(piece.stage for piece in pair[1])))


def _piece(rank: int, rows: Tensor, columns: Tensor, value: Tensor) -> Piece:
    whole = value.detach().reshape(len(rows), len(columns))
    return Piece(rank, rows, columns, whole.to(torch.float64, copy=True))


def _parameters(model: HybridLM, mesh: Mesh, read: Callable[[Tensor], Tensor]) -> dict[Name, Piece]:
    """``read`` of every parameter and buffer; dimensions after the first are flattened to columns."""
    found: dict[Name, Piece] = {}
    for spec, tensor in _tensors(model, mesh).values():
        axes = [torch.zeros(size, dtype=torch.int64) for size in mesh.shape(spec)]
        for held in mesh.held(spec):
            for axis, rows in enumerate(axes):
                first = held.box.start[axis]
                rows[held.local.start[axis] : held.local.stop[axis]] = torch.arange(
                    first, first + held.box.shape[axis]
                )
        columns = torch.zeros(1, dtype=torch.int64)
        for size, axis in zip(spec.shape[1:], axes[1:], strict=True):
            columns = (columns[:, None] * size + axis).flatten()
        found[_split(spec.name)] = _piece(mesh.rank, axes[0], columns, read(tensor))
    return found


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _tensors(model: HybridLM, mesh: Mesh) -> dict[int, tuple[ParamSpec, Tensor]]:
    """Live parameters and buffers with their specs, by identity."""
    found: dict[int, tuple[ParamSpec, Tensor]] = {}
    for spec in (spec for spec in model.config.params() if mesh.has(spec.name)):
        path, _, name = spec.name.rpartition(".")
        tensor = getattr(model.get_submodule(path), name)
        found[id(tensor)] = spec, tensor
    return found


def _split(name: str) -> Name:
    """Unit and tensor of a dotted name: ``layers.3.mixer.D`` is ``layers.3`` and ``mixer.D``."""
    words = name.split(".")
    depth = max((i + 2 for i, word in enumerate(words[:-1]) if word in ("layers", "mtp")), default=1)
    return ".".join(words[:depth]), ".".join(words[depth:])


class _Recorder:
    """Hooks that take one rank's activations and their gradients.

    Args:
        model: what this rank computes.
        mesh: its place.
        tokens: length of the run of tokens that its plane has.
        before: tokens of the global batch that come before those.
    """

    def __init__(self, model: HybridLM, mesh: Mesh, tokens: int, before: int) -> None:
        self.forward: dict[Name, Piece] = {}
        self.backward: dict[Name, Piece] = {}
        self.stage = 0
        self._mesh, self._tokens, self._before = mesh, tokens, before
        self._specs = {key: spec for key, (spec, _) in _tensors(model, mesh).items()}
        self._residual = dim("embed", model.config.hidden_size)
        self._open: list[tuple[str, str]] = []  # units that run: their names, and paths of their modules
        self._choices: dict[str, Tensor] = {}  # of the forward pass
        self._seen: dict[int, Tensor] = {}  # kept alive, so that no identity comes twice
        for path, module in model.named_modules():
            self._watch(path, module)

    def _watch(self, path: str, module: nn.Module) -> None:
        match module:
            case Block() | MTPDepth():
                module.register_forward_pre_hook(lambda _, args: self._enter(path, args))
                module.register_forward_hook(lambda _, args, y: self._leave(path, y))
            case Product() | Lookup() | ConvScan() | Scan() | Enter() | Leave() | RMSNorm():
                module.register_forward_hook(lambda slot, args, y: self._slot(path, slot, args, y))
            case _:
                pass

    def _enter(self, path: str, args: tuple[Any, ...]) -> None:
        ctx, key = args[-2:]
        self._choices = ctx.replay.choices
        self._open.append((key, path))

    def _leave(self, path: str, y: Any) -> None:
        self._note(f"{path}.output", y, self._residual)
        self._open.pop()

    def _slot(self, path: str, slot: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        """Record a slot or norm; what its dimensions are is told by the parameter it uses."""
        owner = path.rpartition(".")[0]
        match slot:
            case Enter():
                self._note(path, y, dim("width", y.shape[1]))
                return
            case Leave():
                self._note(f"{owner}.experts", args[0], dim("width", args[0].shape[1]))
                return
            case RMSNorm():
                used: tuple[Any, ...] = (slot.weight,)
            case _:
                used = args
        spec = next((self._specs[id(item)] for item in used if id(item) in self._specs), None)
        if spec is None:
            return
        if isinstance(slot, Product):
            self._note(f"{owner}.input", args[0], spec.dims[1])
        named = owner if isinstance(slot, (Product, Lookup)) else path
        self._note(named, y, spec.dims[1 if isinstance(slot, Lookup) else 0])

    def _note(self, path: str, value: Tensor, dims: Dim) -> None:
        """Record a tensor under the unit that runs, its gradient too, once."""
        unit, module = self._open[-1] if self._open else _split(path)[:1] * 2
        if unit in self._choices and (unit, CHOICES) not in self.forward:
            chosen = self._choices[unit]
            self._put((unit, CHOICES), chosen, dim("choice", chosen.shape[1]))
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        tensor = path.removeprefix(module).removeprefix(".") or "output"
        name, again = (unit, tensor), 1
        while name in self.forward:
            again += 1
            name = (unit, f"{tensor} ({again})")
        if self._put(name, value, dims) and value.requires_grad:
            value.register_hook(lambda gradient: self._arrive(name, gradient))

    def _put(self, name: Name, value: Tensor, dims: Dim) -> bool:
        """Record a tensor; whether its shape is the one that its dimensions say."""
        rows, columns = self._rows(dims), self._columns(dims)
        flat = value.flatten(1)
        if len(columns) and flat.shape[1] != len(columns):  # items with inner dimensions
            inner = flat.shape[1] // len(columns)
            columns = (columns[:, None] * inner + torch.arange(inner)).flatten()
        if flat.shape != (len(rows), len(columns)):
            return False
        self.forward[name] = replace(_piece(self._mesh.rank, rows, columns, flat), stage=self.stage)
        return True

    def _arrive(self, name: Name, gradient: Tensor) -> None:
        there = self.forward[name]
        self.backward[name] = replace(
            _piece(there.rank, there.rows, there.columns, gradient), stage=there.stage
        )

    def _rows(self, dims: Dim) -> Tensor:
        plane, place = self._mesh.plane, self._mesh.place
        match plane.kind(dims):
            case "embed":
                rows = plane.residual_rows(self._tokens, place)
            case "plain":
                rows = plane.rows(self._tokens, place)
            case _:
                rows = range(self._tokens)
        return torch.arange(rows.start, rows.stop) + self._before

    def _columns(self, dims: Dim) -> Tensor:
        columns: list[int] = []
        origin = 0
        for part in dims:
            items = self._mesh.plane.items(part, self._mesh.place)
            first = origin + items.start * part.width
            columns += range(first, first + len(items) * part.width)
            origin += part.size
        return torch.tensor(columns, dtype=torch.int64)
