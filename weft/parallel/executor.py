"""Runs the list of one seat (``weft.plan.schedule``): one action after the other, nothing else.

Between passes of different stages tensors are cut off from the autograd graph: a stage reads leaves, and its
backward pass ends at them. B computes the gradients of these leaves; those of large weights are queued until
W, unless W follows directly: then both are one backward pass (``weft.ops.late``).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from weft.ops.late import Late
from weft.parallel.offload import Kept
from weft.plan.schedule import Action, Edge, Schedule
from weft.plan.timeline import Span, stream_of

Key = tuple[str, int]
"""A stage and a microbatch, or group of microbatches."""
Place = tuple[Edge, int, bool]
"""An edge, one of its transfers, and whether that is of gradients."""


class Made(NamedTuple):
    """What a forward pass gives.

    Attributes:
        outputs: what goes to other stages: of each edge, one tensor for each of its transfers in this pass,
            in order; one, unless the reader takes fewer microbatches at a time.
        loss: this stage's own part of the loss, if it has one.
    """

    outputs: Mapping[Edge, tuple[Tensor, ...]]
    loss: Tensor | None


class _Pass(NamedTuple):
    """A forward pass whose backward pass has not come.

    Attributes:
        inputs: leaves, by the places where they were.
        ends: where gradients enter, by the places where these will be (those of the loss in none); a tensor
            that was sent is not kept for that.
    """

    inputs: Mapping[Place, Tensor]
    ends: Sequence[tuple[Place | None, GradientEdge | None]]


class Work:
    """What actions mean for the stages of one rank; what is not overridden does nothing."""

    def forward(self, stage: str, index: int, inputs: Mapping[Edge, tuple[Tensor, ...]]) -> Made:
        """Compute a stage.

        Args:
            stage: which.
            index: the microbatch, or group of microbatches.
            inputs: of each edge into the stage, what came in each transfer of this pass, in order: leaves
                that gather gradients where these go back.
        """
        raise NotImplementedError

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        """Launch a transfer, of ``value`` where this rank has its source.

        What is returned waits, and gives what came where this rank has its target.
        """
        raise NotImplementedError

    def enter(self, key: Key, late: bool) -> None:
        """A pass begins; ``late``: a backward pass whose gradients of weights come later."""

    def leave(self, key: Key) -> None:
        """All gradients of a pass are there."""

    def gather(self, stage: str) -> None:
        """Begin to make the parameters of a stage whole."""

    def free(self, stage: str) -> None:
        """They are needed no longer."""

    def reduce(self, stage: str) -> None:
        """Begin to sum its gradients over ranks."""

    def step(self) -> None:
        """Update."""

    def parameters(self) -> frozenset[int]:
        """Storages that are no activations (``weft.parallel.offload.storage``)."""
        return frozenset()


class Executor:
    """The list of one seat.

    Args:
        schedule: proved (``weft.plan.prove``).
        rank: which list.
        work: what its actions do.
        device: whose clock tells when they ran.

    Attributes:
        late: the queue of weight gradients; attach it to the model where the list ``splits`` passes.
        splits: whether some B is not directly followed by its W.
        peak: the most passes whose activations were kept on the device at one time in the last run.
    """

    def __init__(self, schedule: Schedule, rank: int, work: Work, device: torch.device | None = None) -> None:
        self.actions, self.rank, self.work = schedule.lists[rank], rank, work
        self.late = Late()
        self.peak = 0
        self._graph, self._microbatches = schedule.graph, schedule.microbatches
        self._here = frozenset(self._graph.at(rank))
        self._moved = {(a.unit, a.microbatch) for a in self.actions if a.op == "OUT"}
        self._last = {a.unit: at for at, a in enumerate(self.actions) if a.op == "REDUCE"}
        self._clock = _Clock(device)
        cuda = device is not None and device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if cuda else None  # where activations go out and in
        self._do: dict[str, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "W": self._weights,
            "POST": self._post,
            "WAIT": self._wait,
            "OUT": self._out,
            "IN": self._in,
            "GATHER": lambda action: work.gather(action.unit),
            "FREE": lambda action: work.free(action.unit),
            "REDUCE": self._reduce,
            "STEP": lambda action: work.step(),
        }
        self.splits = any(a.op == "B" and after != a._replace(op="W") for a, after in pairwise(self.actions))
        self._forget()

    def _forget(self) -> None:
        self._values: dict[Place, Tensor] = {}
        self._flying: dict[Place, Callable[[], Tensor | None]] = {}
        self._passes: dict[Key, _Pass] = {}
        self._kept: dict[Key, Kept] = {}
        self._whole: Key | None = None  # the backward pass that W has nothing to add to
        self._live = self._at = 0
        self.late.forget()

    def run(self) -> list[Span]:
        """Everything, in order; when each action began and ended, in seconds since the start."""
        self._forget()
        self.peak = 0
        marks = [self._clock.mark()]
        try:
            for at, action in enumerate(self.actions):
                self._at, after = at, self.actions[at + 1 : at + 2]
                if action.op == "B" and after == (action._replace(op="W"),):
                    self._whole = action.unit, action.microbatch
                self._do[action.op](action)
                marks.append(self._clock.mark())
        except BaseException:
            self._forget()
            raise
        times = self._clock.seconds(marks)
        rows = zip(self.actions, times, times[1:], strict=False)
        return [Span(self.rank, stream_of(a, self._receives(a)), a, start, end) for a, start, end in rows]

    def _ends(self, action: Action) -> tuple[bool, bool]:
        """Whether this rank has the source and the target of a transfer."""
        source, target = (end in self._here for end in action.edge)
        return (target, source) if action.back else (source, target)

    def _receives(self, action: Action) -> bool:
        """Whether only the reading end of a transfer is here."""
        return bool(action.target) and self._ends(action) == (False, True)

    def _places(self, edge: Edge, key: Key, back: bool = False) -> list[Place]:
        """Of what goes over an edge in a pass of one of its ends."""
        return [(edge, part, back) for part in self._graph.parts(edge, *key, self._microbatches)]

    def _count(self, change: int) -> None:
        self._live += change
        self.peak = max(self.peak, self._live)

    def _forward(self, action: Action) -> None:
        key, graph = (action.unit, action.microbatch), self._graph
        training = torch.is_grad_enabled() and key[0] not in graph.frozen
        into = {e: self._places(e, key) for e in graph.edges if e.target == key[0]}
        inputs = {edge: tuple(self._values.pop(place) for place in places) for edge, places in into.items()}
        leaves: dict[Place, Tensor] = {}
        for edge, places in into.items() if training else ():
            if graph.returns(edge):
                leaves |= zip(places, (value.requires_grad_() for value in inputs[edge]), strict=True)
        self.work.enter(key, late=False)
        with self._keeping(key) if training else torch.no_grad():
            made = self.work.forward(*key, inputs)
        ends: list[tuple[Place | None, GradientEdge | None]] = []
        for edge, values in made.outputs.items():
            for place, value in zip(self._places(edge, key), values, strict=True):
                self._values[place] = value.detach()
                ends.append(((*place[:2], True), _end(value)))
        if training:
            if made.loss is not None:
                ends.append((None, _end(made.loss)))
            self._passes[key] = _Pass(leaves, ends)
            self._count(1)

    def _keeping(self, key: Key) -> AbstractContextManager[Any]:
        if key not in self._moved:
            return nullcontext()
        self._kept[key] = Kept(self.work.parameters(), self._copies)
        return self._kept[key].hooks()

    def _backward(self, action: Action) -> None:
        key = action.unit, action.microbatch
        inputs, ends = self._passes.pop(key)
        pairs = [(end, None if place is None else self._values.pop(place)) for place, end in ends]
        enter = [(end, gradient) for end, gradient in pairs if end is not None]
        whole = self._whole == key
        self.work.enter(key, late=not whole)
        with nullcontext() if whole else self.late.defer(key):
            if enter:
                torch.autograd.backward([end for end, _ in enter], [gradient for _, gradient in enter])
        self._kept.pop(key, None)  # what W still needs is in the queue
        for (edge, part, _), leaf in inputs.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self._values[edge, part, True] = gradient
        if whole:
            self.work.leave(key)

    def _weights(self, action: Action) -> None:
        key = action.unit, action.microbatch
        if self._whole == key:
            self._whole = None
        else:
            self.late.run(key)
            self.work.leave(key)
        self._count(-1)

    def _post(self, action: Action) -> None:
        place = action.edge, action.microbatch, action.back
        value = self._values.pop(place) if self._ends(action)[0] else None
        self._flying[place] = self.work.post(action, value)

    def _wait(self, action: Action) -> None:
        place = action.edge, action.microbatch, action.back
        came = self._flying.pop(place)()
        if came is not None:
            self._values[place] = came

    def _reduce(self, action: Action) -> None:
        if self._at == self._last[action.unit]:  # until then, passes may add to what is summed
            self.work.reduce(action.unit)

    def _out(self, action: Action) -> None:
        key = action.unit, action.microbatch
        self._kept[key].out()
        for leaf in self._passes[key].inputs.values():  # only its gradient is still of use
            leaf.data = leaf.new_empty(()).expand(leaf.shape)
        self._count(-1)

    def _in(self, action: Action) -> None:
        self._kept[action.unit, action.microbatch].back()
        self._count(1)


def _end(value: Tensor) -> GradientEdge | None:
    """Where its gradient enters; None where it has none."""
    return get_gradient_edge(value) if value.requires_grad else None


class _Clock:
    """Moments of the device: on CUDA, when its queue gets there."""

    def __init__(self, device: torch.device | None) -> None:
        self._cuda = device is not None and device.type == "cuda"

    def mark(self) -> Any:
        """Now."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[Any]) -> list[float]:
        """Of each mark, since the first one."""
        if self._cuda:
            torch.cuda.synchronize()
            return [marks[0].elapsed_time(mark) / 1e3 for mark in marks]
        return [mark - marks[0] for mark in marks]
