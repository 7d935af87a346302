"""Small networks of any graph of stages: the work of one seat for the executor; plain autograd for all.

A stage has rows of its own on each of its seats, of each of the microbatches that it takes at a time. Where
something is sent over an edge, every seat of the target gets the sum of what all seats of the source made.
"""

import time
import zlib
from collections.abc import Callable, Hashable, Mapping
from graphlib import TopologicalSorter

import torch
from torch import Tensor, nn

from weft.ops.late import attach
from weft.ops.linear import linear
from weft.parallel.comm import Comm
from weft.parallel.executor import Executor, Made, Work
from weft.parallel.offload import storage
from weft.plan.schedule import Action, Edge, Graph, Schedule

Rows = Callable[[str, int], int]  # of a stage and a microbatch


def rows(stage: str, microbatch: int) -> int:
    """Another number for each microbatch, so that none passes for another."""
    return 3 + microbatch


def drawn(shape: tuple[int, ...], *name: object) -> Tensor:
    """Random numbers, the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(name).encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Stage(nn.Module):
    """Reads what comes over its edges and data of its own; writes to each of its edges something else.

    Stages that write nowhere have a loss, and some others too.
    """

    def __init__(self, graph: Graph, name: str, width: int) -> None:
        super().__init__()
        self.reads = [edge for edge in graph.edges if edge.target == name]
        self.gives = [edge for edge in graph.edges if edge.source == name]
        self.shift = nn.Parameter(drawn((width,), "shift", name))
        self.weights = nn.ParameterDict(
            {
                f"{edge.source}>{edge.target}": nn.Parameter(drawn((width, width), name, *edge) / width**0.5)
                for edge in (*self.reads, *self.gives)
            }
        )
        self.counts = not self.gives or zlib.crc32(name.encode()) % 3 == 0

    def weight(self, edge: Edge) -> Tensor:
        return self.weights[f"{edge.source}>{edge.target}"]

    def mixed(self, inputs: Mapping[Edge, Tensor], data: Tensor) -> Tensor:
        """[rows, width] of everything that is read."""
        return torch.tanh(
            sum((linear(inputs[e], self.weight(e)) for e in self.reads), start=data + self.shift)
        )

    def forward(
        self, inputs: Mapping[Edge, Tensor], data: Tensor
    ) -> tuple[dict[Edge, Tensor], Tensor | None]:
        x = self.mixed(inputs, data)
        outputs = {edge: linear(x, self.weight(edge)) for edge in self.gives}
        return outputs, (x * x * data).sum() if self.counts else None


class Net(Work):
    """The stages of one seat, which are gathered, freed, reduced and stepped as a store would.

    Attributes:
        gradients: of each parameter, as they were summed when STEP came.
        done: what was called, in order, as actions, and when.
        fails: the action at which this rank raises.
    """

    made: type[Stage] = Stage

    def __init__(self, schedule: Schedule, comm: Comm, width: int = 4, rows: Rows = rows) -> None:
        self.graph, self.microbatches = schedule.graph, schedule.microbatches
        self.width, self.rows = width, rows
        self.stages = {name: self.made(self.graph, name, width) for name in self.graph.at(comm.rank)}
        for name in self.stages.keys() & fixed(self.graph):
            self.stages[name].requires_grad_(False)
        self.gathers = {a.unit for actions in schedule.lists for a in actions if a.op == "GATHER"}
        self.kept = {name: [p.detach().clone() for p in s.parameters()] for name, s in self.stages.items()}
        self.join(comm)
        self.fails: Action | None = None
        self.begin()
        for stage in self.gathers & self.stages.keys():
            self._hide(stage)

    def join(self, comm: Comm) -> None:
        """Talk over this communicator from now on; a collective call."""
        self.comm, self.ways = comm, dict[tuple[Edge, bool], Comm]()
        for edge in filter(self.graph.crosses, self.graph.edges):
            for back in (False, True):
                if comm.rank in (party := self.graph.party(edge)):
                    name = f"{edge.source}{'<' if back else '>'}{edge.target}"
                    self.ways[edge, back] = comm.group(party, name)
        self.meets = {
            name: comm.group(self.graph.home[name], f"meet {name}")
            for name in self.stages
            if name in self.graph.joined and len(self.graph.home[name]) > 1
        }

    def begin(self) -> None:
        """A step."""
        self.done: list[tuple[Action, float]] = []
        self.seen: set[Hashable] = set()
        self.loss = 0.0
        self.sums: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        for stage in self.stages.values():
            stage.zero_grad()

    def note(self, action: Action) -> None:
        self.done.append((action, time.perf_counter()))
        if action.unit in self.meets and not action.target:  # hangs if others do something else
            self.meets[action.unit].barrier()
        if action == self.fails:
            raise ArithmeticError(f"rank {self.comm.rank} fails at {action}")

    def data(self, stage: str, index: int) -> Tensor:
        """Of the microbatches of a pass."""
        every = covered(self.graph, stage, index, self.microbatches)
        shapes = [(self.rows(stage, i), self.width) for i in every]
        return torch.cat([drawn(s, stage, self.comm.rank, i) for s, i in zip(shapes, every, strict=True)])

    def forward(self, stage: str, index: int, inputs: Mapping[Edge, tuple[Tensor, ...]]) -> Made:
        whole = {edge: torch.cat(parts) for edge, parts in inputs.items()}
        outputs, loss = self.stages[stage](whole, self.data(stage, index))
        self.loss += float(loss.detach()) if loss is not None else 0.0
        parts: dict[Edge, tuple[Tensor, ...]] = {}
        for edge, x in outputs.items():
            sizes = [
                sum(self.rows(stage, i) for i in spans(self.graph, edge, part, self.microbatches))
                for part in self.graph.parts(edge, stage, index, self.microbatches)
            ]
            parts[edge] = x.split(sizes)
        return Made(parts, loss)

    def enter(self, key: Hashable, late: bool) -> None:
        self.note(Action("B" if key in self.seen else "F", *key))
        self.seen.add(key)

    def leave(self, key: Hashable) -> None:
        self.note(Action("W", *key))

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        self.note(action)
        way, edge = self.ways[action.edge, action.back], action.edge
        party, (source, target) = self.graph.party(edge), (self.graph.home[end] for end in edge)
        senders, readers = (target, source) if action.back else (source, target)
        here = self.comm.rank
        count = sum(self.rows(action.unit, i) for i in spans(self.graph, edge, action[2], self.microbatches))
        assert (value is not None) == (here in senders)
        assert value is None or len(value) == count
        came = {
            party.index(seat): torch.empty((count, self.width), dtype=torch.float64)
            for seat in (senders if here in readers else ())
            if seat != here
        }
        sends = {party.index(seat): value for seat in readers if seat != here and value is not None}
        transfer = way.start_transfer(sends, came)

        def wait() -> Tensor | None:
            transfer.wait()
            self.note(action._replace(op="WAIT"))
            own = [value] if here in senders and value is not None else []
            return sum([*came.values(), *own[1:]], start=(own or [0.0])[0]) if here in readers else None

        return wait

    def gather(self, stage: str) -> None:
        self.note(Action("GATHER", stage))
        for param, value in zip(self.stages[stage].parameters(), self.kept[stage], strict=True):
            param.data.copy_(value)

    def free(self, stage: str) -> None:
        self.note(Action("FREE", stage))
        self._hide(stage)

    def _hide(self, stage: str) -> None:
        for param in self.stages[stage].parameters():
            param.data.fill_(torch.nan)

    def reduce(self, stage: str) -> None:
        self.note(Action("REDUCE", stage))
        for name, param in self.stages[stage].named_parameters():
            if param.grad is not None:
                self.sums[f"{stage} {name}"] = self.sums.get(f"{stage} {name}", 0.0) + param.grad
                param.grad = None

    def step(self) -> None:
        self.comm.barrier()
        self.note(Action("STEP"))
        self.gradients = {name: total.clone() for name, total in self.sums.items()}

    def parameters(self) -> frozenset[int]:
        return frozenset(storage(p) for stage in self.stages.values() for p in stage.parameters())


def executor(schedule: Schedule, work: Net) -> Executor:
    """Ready to run; weight gradients are queued where the list asks for it."""
    made = Executor(schedule, work.comm.rank, work)
    for stage in work.stages.values():
        attach(stage, made.late if made.splits else None)
    return made


def covered(graph: Graph, stage: str, index: int, microbatches: int) -> range:
    """Microbatches of a pass."""
    size = graph.size(stage)
    return range(index * size, min((index + 1) * size, microbatches))


def spans(graph: Graph, edge: Edge, part: int, microbatches: int) -> range:
    """Microbatches of a transfer."""
    return covered(graph, min(edge, key=graph.size), part, microbatches)


def fixed(graph: Graph) -> frozenset[str]:
    """Stages whose parameters have no gradients: those that are frozen, and some that are behind others."""
    some = (stage for stage in graph.home if zlib.crc32(f"fixed {stage}".encode()) % 6 == 0)
    return graph.frozen.union(some if graph.frozen else ())


def oracle(graph: Graph, microbatches: int, width: int = 4) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all stages in one process."""
    order = TopologicalSorter({s: {e.source for e in graph.edges if e.target == s} for s in graph.home})
    names = list(order.static_order())
    stages = {name: Stage(graph, name, width) for name in names}
    for name in fixed(graph):
        stages[name].requires_grad_(False)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(microbatches):
        made: dict[tuple[Edge, int], Tensor] = {}
        for name in names:
            for seat in graph.home[name]:
                read = {
                    e: sum(made[e, s] for s in graph.home[e.source]) if graph.crosses(e) else made[e, seat]
                    for e in stages[name].reads
                }
                outputs, loss = stages[name](read, drawn((rows(name, i), width), name, seat, i))
                made |= {(edge, seat): x for edge, x in outputs.items()}
                total = total + (0.0 if loss is None else loss)
    if total.requires_grad:
        total.backward()
    gradients = {
        f"{name} {n}": p.grad
        for name, s in stages.items()
        for n, p in s.named_parameters()
        if p.grad is not None
    }
    return total.item(), gradients


def left_over(made: Executor) -> list[str]:
    """What an executor still holds after a run."""
    holds = ("_values", "_flying", "_passes", "_kept", "_whole", "_live")
    return [name for name in holds if getattr(made, name)] + ["late"] * bool(made.late.keys)


def faults(results: list[tuple[float, dict[str, Tensor], list[str]]], graph: Graph, count: int) -> list[str]:
    """How loss, gradients and what is left over on all ranks differ from the oracle."""
    loss, want = oracle(graph, count)
    found = [f"left: {left}" for *_, left in results if left]
    if abs(sum(part for part, *_ in results) - loss) > 1e-10 * max(1.0, abs(loss)):
        found.append("loss")
    got: dict[str, Tensor] = {}
    for _, part, _ in results:  # the seats of a stage have parts of the sum
        got |= {name: got.get(name, 0.0) + value for name, value in part.items()}
    found += [f"{name} is missing, or too much" for name in got.keys() ^ want.keys()]
    for name in got.keys() & want.keys():
        most = 1e-10 * max(1.0, float(want[name].abs().max()))
        if not (error := float((got[name] - want[name]).abs().max())) <= most:
            found.append(f"{name}: {error:.3g}")
    return found


def step(schedule: Schedule, comm: Comm) -> tuple[float, dict[str, Tensor], list[str]]:
    """One step: loss and gradients of this rank, and what is left over."""
    net = Net(schedule, comm)
    made = executor(schedule, net)
    made.run()
    return net.loss, net.gradients, left_over(made)
