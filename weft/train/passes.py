"""Forward and backward passes of the stages that a rank has: what the actions of a schedule do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.data.batch import Batch
from weft.ops.rows import written
from weft.parallel.executor import Made, Work
from weft.parallel.offload import storage
from weft.parallel.store import Store
from weft.plan.boundary import Group, Table
from weft.plan.plans import module_of, stage_of
from weft.plan.schedule import Action, Edge, Graph
from weft.plan.stages import Piece
from weft.spec.modules import DECODER
from weft.train.encode import Encoding, Inputs
from weft.train.objective import Outcome, Run, Totals, stage_objective, to_device
from weft.train.team import Member, Team

Values = Mapping[Edge, tuple[Tensor, ...]]
"""What goes over each edge: a tensor for each of its transfers in a pass."""


class Stages(Work):
    """The stages of one rank, and the microbatches that they read.

    Args:
        team: what is here.
        graph: of the schedule.
    """

    def __init__(self, team: Team, graph: Graph) -> None:
        self.team, self.graph = team, graph
        self._batches: Sequence[Batch] = ()
        self._tables: Sequence[Table] = ()
        self._inputs = Inputs({}, {})
        self._runs: dict[int, Run] = {}

    def read(
        self, batches: Sequence[Batch], tables: Sequence[Table] = (), inputs: Inputs | None = None
    ) -> None:
        """Take the microbatches of the next list of actions.

        Args:
            batches: this rank's share of each.
            tables: lengths of each, of all readers; where layouts differ.
            inputs: what encoders read; where there are any.
        """
        self._batches, self._tables, self._runs = batches, tables, {}
        self._inputs = inputs or Inputs({}, {})

    def run(self, microbatch: int) -> Run:
        """A microbatch on the device."""
        member = self.team.members[DECODER]
        if microbatch not in self._runs:
            device = member.model.device
            self._runs[microbatch] = to_device(self._batches[microbatch], device, member.mesh)
        return self._runs[microbatch]

    def forward(self, stage: str, index: int, inputs: Values) -> Made:
        """A stage of the decoder, or of an encoder."""
        name, number = module_of(stage)
        member = self.team.members[name]
        piece = member.cut.pieces[number]
        if name != DECODER:
            return self._encode(stage, piece, self._encoding(name, index), inputs)
        before = stage_of(DECODER, number - 1) if number else ""
        x = next((parts[0] for edge, parts in inputs.items() if edge.source == before), None)
        if piece.first:
            x = self.embedded(index, inputs)
        return self.decode(stage, piece, index, x)

    def decode(self, stage: str, piece: Piece, microbatch: int, x: Tensor | None) -> Made:
        """A stage of the decoder, from the residual stream before its layers."""
        raise NotImplementedError

    def embedded(self, microbatch: int, inputs: Values) -> Tensor:
        """Token table, with rows of encoders where their placeholders are."""
        member, model = self.team.members[DECODER], self.team.lm
        assert model is not None  # noqa: S101 - a stage of it runs
        x = model.embed(self.run(microbatch).tokens)
        for edge, (rows,) in inputs.items():
            name, _ = module_of(edge.source)
            group, inside = self._group(name, microbatch)
            places = group.wanted(member.mesh.rank, inside)
            if name in member.module.moved:
                rows = model.projectors[name](rows)
            starts = [torch.arange(run.start, run.stop, device=x.device) for run in places]
            at = torch.cat(starts) if starts else torch.zeros(0, dtype=torch.int64, device=x.device)
            x = written(x, rows.to(x.dtype), at)  # also no rows: what needs gradients is alike on all ranks
        return x

    def _encode(self, stage: str, piece: Piece, encoding: Encoding, inputs: Values) -> Made:
        """A stage of an encoder."""
        edges = [edge for edge in self.graph.edges if edge.source == stage]
        if encoding.idle:
            made = encoding.nothing(piece)
        else:
            (x,) = next(iter(inputs.values()), (None,))
            x = encoding.first(self._inputs.data[encoding.key]) if x is None else x
            x = encoding.model.through(x, piece.layers, encoding.context())
            made = encoding.last(x) if piece.last else (x,)
        return Made(dict.fromkeys(edges, made), None)

    def _encoding(self, name: str, number: int) -> Encoding:
        return Encoding(self.team.members[name], number, self._inputs.groups[name, number])

    def _group(self, name: str, microbatch: int) -> tuple[Group, int]:
        """The group of an encoder that has a microbatch, and its number there."""
        every = self._inputs.every[name]
        return self._inputs.groups[name, microbatch // every], microbatch % every

    def outputs(self, stage: str, x: Tensor | None) -> dict[Edge, tuple[Tensor, ...]]:
        """What a stage of the decoder hands on."""
        edges = [edge for edge in self.graph.edges if edge.source == stage]
        return {edge: (x,) for edge in edges if x is not None}

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        """Rows, or their gradients, to or from the next or previous stage."""
        name, _ = module_of(action.unit)
        if name == DECODER:
            microbatch = action.microbatch
            sizes = self._tables[microbatch].sizes if self._tables else ()
            tokens = sum(self._batches[microbatch].windows)
            return self.team.members[name].links.post(action, value, tokens, sizes)
        if module_of(action.target)[0] == DECODER:
            group, inside = self._group(name, action.microbatch)
            border = self.team.borders[name]
            return (border.backward if action.back else border.forward)(group.route(inside), value)
        ctx = self._encoding(name, action.microbatch).context()
        rows = len(range(sum(ctx.segments.lengths))[ctx.rows])
        return self.team.members[name].links.post_rows(action, value, rows)

    def parameters(self) -> frozenset[int]:
        """They rest with the store, or are not trained."""
        members = self.team.members.values()
        return frozenset(storage(param) for member in members for param in member.model.parameters())


class Training(Stages):
    """Losses and gradients of a step.

    Args:
        team: what is here.
        graph: of the schedule.
        stores: of the modules here of which something is trained.
        chunk: tokens whose logits exist at a time.
        noted: told of each forward pass of the decoder: its tokens, and what the stage made of them.
    """

    def __init__(
        self,
        team: Team,
        graph: Graph,
        stores: Mapping[str, Store],
        chunk: int,
        noted: Callable[[Run, Outcome], None],
    ) -> None:
        super().__init__(team, graph)
        self.stores, self.chunk, self.noted = stores, chunk, noted
        self.totals = Totals((), 1, 0.0)
        self._known: dict[str, Any] = {}
        self._update: Callable[[], None] = lambda: None

    def begin(self, totals: Totals, update: Callable[[], None], **known: Any) -> None:
        """A step: counts of the global batch, what updates at its end, further fields of contexts."""
        self.totals, self._update, self._known = totals, update, known

    def decode(self, stage: str, piece: Piece, microbatch: int, x: Tensor | None) -> Made:
        """One stage's part of the objective."""
        run, model = self.run(microbatch), self.team.lm
        assert model is not None  # noqa: S101 - a stage of it runs
        made = stage_objective(model, piece, x, run, self.totals, self.chunk, **self._known)
        self.noted(run, made)
        return Made(self.outputs(stage, made.x), made.loss)

    def _store(self, stage: str) -> tuple[Store | None, Member, int]:
        name, number = module_of(stage)
        return self.stores.get(name), self.team.members[name], number

    def enter(self, key: tuple[str, int], late: bool) -> None:
        """Uses of units from here on are of this pass."""
        if store := self._store(key[0])[0]:
            store.enter(key, late)

    def leave(self, key: tuple[str, int]) -> None:
        """What is left of its gradients is summed."""
        if store := self._store(key[0])[0]:
            store.end_pass(key)

    def gather(self, stage: str) -> None:
        """All units of the stage."""
        store, member, number = self._store(stage)
        if store:
            store.hold(_units(member, number))

    def free(self, stage: str) -> None:
        """All units of the stage."""
        store, member, number = self._store(stage)
        if store:
            store.release(_units(member, number))

    def reduce(self, stage: str) -> None:
        """Where units have not done it in their passes."""
        store, _, number = self._store(stage)
        if store:
            store.reduce_stage(str(number))

    def step(self) -> None:
        """What ``begin`` was given."""
        self._update()


def _units(member: Member, number: int) -> list[str]:
    return [unit for unit in member.model.units() if member.cut.pieces[number].has(unit)]


class Answer(NamedTuple):
    """A target, as evaluation saw it.

    Attributes:
        sample: its sample.
        document: number of its document in what one reader read.
        place: of its token in the sample.
        best: the most likely token there.
        target: the right one.
    """

    sample: int
    document: int
    place: int
    best: int
    target: int


class Reading(Stages):
    """Next-token losses without gradients, for evaluation.

    Args:
        team: what is here.
        graph: of the schedule.
        chunk: tokens whose logits exist at a time.
        graded: also find the most likely token at every target.

    Attributes:
        nats: summed loss of the targets here.
        answers: of the targets here.
    """

    def __init__(self, team: Team, graph: Graph, chunk: int, graded: bool = False) -> None:
        super().__init__(team, graph)
        self.chunk, self.graded = chunk, graded
        self.nats = torch.zeros((), dtype=torch.float64, device=team.device)
        self.answers: list[Answer] = []

    def decode(self, stage: str, piece: Piece, microbatch: int, x: Tensor | None) -> Made:
        """One stage; the last one adds to ``nats``."""
        run, model = self.run(microbatch), self.team.lm
        assert model is not None  # noqa: S101 - a stage of it runs
        assert x is not None  # noqa: S101 - the first stage has embedded
        x = model.through(x, piece.layers, model.context(run.segments))
        if piece.last:
            targets = run.future[:1].masked_fill(~run.mask[:1], -1)
            state = model.norm(x)
            self.nats += model.head([state], targets, [1.0], self.chunk)[0]
            if self.graded:
                self._grade(run, targets[0], model.head.best(state, targets[0], self.chunk))
        return Made(self.outputs(stage, None if piece.last else x), None)

    def _grade(self, run: Run, targets: Tensor, best: Tensor) -> None:
        """Note what was most likely at the targets here; of ranks with the same rows, one does."""
        mesh = self.team.members[DECODER].mesh
        if mesh.place % mesh.plane.tp_embed:
            return
        rows = mesh.plane.residual_rows(len(targets), mesh.place)
        here = slice(rows.start, rows.stop)
        documents = run.segments.whole.ids(targets.device)[run.segments.start :][here]
        columns = torch.stack([run.places[here], documents, best, targets[here]])
        for place, document, guess, target in columns[:, targets[here] >= 0].t().tolist():
            self.answers.append(Answer(place >> 32, document, place & 0xFFFFFFFF, guess, target))
