"""Steps whose actions take time, of sleep or of arithmetic: executed, and simulated from measured costs."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tests.parallel import nets
from weft.ops.late import gradient, queued
from weft.ops.linear import linear
from weft.parallel.comm import Comm
from weft.plan.pipelines import SPLIT, compute
from weft.plan.placing import complete
from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Schedule
from weft.plan.simulate import simulate
from weft.plan.timeline import Span, Timeline, merged

STAGES = {"interleaved": 2, "zbv": 2}
WIDTH, ROWS, DEPTH = 384, 96, 6  # of arithmetic: some milliseconds a pass


class Nap(torch.autograd.Function):
    """The identity; forward, backward and the gradient of the weight sleep for so many seconds each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds, ctx.weight = seconds, queued(weight)
        ctx.save_for_backward(weight)
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def late(like: Tensor) -> Tensor:
            time.sleep(ctx.seconds)
            return torch.zeros_like(like)

        time.sleep(ctx.seconds)
        return grad, gradient(ctx.weight, late, *ctx.saved_tensors), None


class Napping(nets.Stage):
    seconds = 0.0

    def mixed(self, inputs: Mapping[Edge, Tensor], data: Tensor) -> Tensor:
        return Nap.apply(super().mixed(inputs, data), self.shift, self.seconds)


class Computing(nets.Stage):
    """Products with weights, one after the other."""

    def __init__(self, graph: Graph, name: str, width: int) -> None:
        super().__init__(graph, name, width)
        self.layers = nn.ParameterList(
            nn.Parameter(nets.drawn((width, width), name, i) / width**0.5) for i in range(DEPTH)
        )

    def mixed(self, inputs: Mapping[Edge, Tensor], data: Tensor) -> Tensor:
        x = super().mixed(inputs, data)
        for weight in self.layers:
            x = torch.tanh(linear(x, weight))
        return x


class NappingNet(nets.Net):
    made = Napping


class ComputingNet(nets.Net):
    """Its data is made beforehand."""

    made = Computing

    def __init__(self, schedule: Schedule, comm: Comm) -> None:
        super().__init__(schedule, comm, WIDTH, lambda stage, i: ROWS)
        every = [(stage, i) for stage in self.stages for i in range(schedule.microbatches)]
        self.drawn = {key: nets.drawn((ROWS, WIDTH), *key) for key in every}

    def data(self, stage: str, microbatch: int) -> Tensor:
        return self.drawn[stage, microbatch]


def pipeline(kind: str, ranks: int, microbatches: int) -> Schedule:
    """The lists of a kind."""
    graph, lists = compute(kind, ranks, STAGES.get(kind, 1), microbatches)
    return complete(graph, lists, split=kind in SPLIT)


def steps(net: nets.Net, schedule: Schedule, count: int) -> list[Timeline]:
    """Timelines of all ranks together, of each of so many steps after a first one; the same on all ranks."""
    made, told = nets.executor(schedule, net), list[Timeline]()
    for _ in range(count + 1):
        net.begin()
        net.comm.barrier()
        rows = Timeline(tuple(made.run())).as_rows()
        told.append(merged(map(Timeline.from_rows, net.comm.gather_objects(rows)), meet=True))
    return told[1:]


def napping(comm: Comm, kind: str, microbatches: int, seconds: float, count: int) -> list[list[float]]:
    """Makespan and bubble share of the fastest step, and of the simulation."""
    schedule = pipeline(kind, comm.size, microbatches)
    net = NappingNet(schedule, comm)
    for stage in net.stages.values():
        stage.seconds = seconds
    fastest = min(steps(net, schedule, count), key=lambda line: line.makespan)
    line = simulate(schedule, lambda done: seconds if done.op in COMPUTE else 0.0)
    return [[one.makespan, one.bubble_share] for one in (fastest, line)]


def computing(comm: Comm, kind: str, microbatches: int, count: int) -> list[list[float]]:
    """The same with real arithmetic, and costs that are medians over all steps."""
    schedule = pipeline(kind, comm.size, microbatches)
    lines = steps(ComputingNet(schedule, comm), schedule, count)
    line = simulate(schedule, measured(schedule, [span for one in lines for span in one.spans]))
    fastest = min(lines, key=lambda one: one.makespan)
    return [[one.makespan, one.bubble_share] for one in (fastest, line)]


def measured(schedule: Schedule, spans: list[Span]) -> Callable[[Action], float]:
    """Median seconds of each sort of action: what of which stage, and whether B and W are one pass."""
    whole = {
        one
        for actions in schedule.lists
        for one, after in zip(actions, actions[1:], strict=False)
        if after == one._replace(op="W")
    }

    def sort(action: Action) -> tuple[str, str, bool]:
        return action.op, action.unit, action._replace(op="B") in whole

    seconds: defaultdict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for span in spans:
        seconds[sort(span.action)].append(span.end - span.start)
    costs = {name: median(values) for name, values in seconds.items()}
    return lambda action: 0.0 if action.op == "STEP" else costs[sort(action)]
