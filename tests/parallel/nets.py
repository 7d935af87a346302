"""Small networks of any graph of stages: the work of one rank for the executor; plain autograd for all."""

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

    def forward(self, inputs: Mapping[Edge, Tensor], data: Tensor) -> Made:
        x = self.mixed(inputs, data)
        outputs = {edge: linear(x, self.weight(edge)) for edge in self.gives}
        return Made(outputs, (x * x * data).sum() if self.counts else None)


class Net(Work):
    """The stages of one pipeline rank, which are gathered, freed, reduced and stepped as a store would.

    Attributes:
        gradients: of each parameter, as they were summed when STEP came.
        done: what was called, in order, as actions, and when.
        fails: the action at which this rank raises.
    """

    made: type[Stage] = Stage

    def __init__(self, schedule: Schedule, comm: Comm, width: int = 4, rows: Rows = rows) -> None:
        self.graph, self.width, self.rows = schedule.graph, width, rows
        self.stages = {name: self.made(self.graph, name, width) for name in self.graph.at(comm.rank)}
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
            ends = self.graph.home[edge.source], self.graph.home[edge.target]
            for back in (False, True):
                if comm.rank in ends:
                    self.ways[edge, back] = comm.group(
                        ends, f"{edge.source}{'<' if back else '>'}{edge.target}"
                    )

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
        if action == self.fails:
            raise ArithmeticError(f"rank {self.comm.rank} fails at {action}")

    def data(self, stage: str, microbatch: int) -> Tensor:
        return drawn((self.rows(stage, microbatch), self.width), stage, microbatch)

    def forward(self, stage: str, microbatch: int, inputs: Mapping[Edge, Tensor]) -> Made:
        made = self.stages[stage](inputs, self.data(stage, microbatch))
        self.loss += float(made.loss.detach()) if made.loss is not None else 0.0
        return made

    def enter(self, key: Hashable, late: bool) -> None:
        self.note(Action("B" if key in self.seen else "F", *key))
        self.seen.add(key)

    def leave(self, key: Hashable) -> None:
        self.note(Action("W", *key))

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        self.note(action)
        way = self.ways[action.edge, action.back]
        here = (self.rows(action.unit, action.microbatch), self.width)
        came = torch.empty(here, dtype=torch.float64) if value is None else None
        peer = 1 - way.rank
        transfer = way.start_transfer(
            {} if value is None else {peer: value}, {} if came is None else {peer: came}
        )

        def wait() -> Tensor | None:
            transfer.wait()
            self.note(action._replace(op="WAIT"))
            return came

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


def oracle(graph: Graph, microbatches: int, width: int = 4) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all stages in one process."""
    order = TopologicalSorter({s: {e.source for e in graph.edges if e.target == s} for s in graph.home})
    names = list(order.static_order())
    stages = {name: Stage(graph, name, width) for name in names}
    total = torch.zeros((), dtype=torch.float64)
    for i in range(microbatches):
        values: dict[Edge, Tensor] = {}
        for name in names:
            made = stages[name](values, drawn((rows(name, i), width), name, i))
            values |= made.outputs
            total = total + (0.0 if made.loss is None else made.loss)
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
    got = {name: value for _, part, _ in results for name, value in part.items()}
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
