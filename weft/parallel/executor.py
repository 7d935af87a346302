"""Runs the list of one pipeline rank (``weft.plan.schedule``): one action after the other, nothing else.

Between passes of different stages tensors are cut off from the autograd graph: a stage reads leaves, and its
backward pass ends at them. B computes the gradients of these leaves; those of large weights are queued until
W, unless W follows directly: then both are one backward pass (``weft.ops.late``).
"""

import time
from collections.abc import Callable, Mapping
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
"""A stage and a microbatch."""


class Made(NamedTuple):
    """What a forward pass gives.

    Attributes:
        outputs: what goes to other stages.
        loss: this stage's own part of the loss, if it has one.
    """

    outputs: Mapping[Edge, Tensor]
    loss: Tensor | None


class _Pass(NamedTuple):
    """A forward pass whose backward pass has not come.

    Attributes:
        inputs: leaves.
        outputs: where gradients enter; a tensor that was sent is not kept for that.
        loss: where its own part of the loss does.
    """

    inputs: Mapping[Edge, Tensor]
    outputs: Mapping[Edge, GradientEdge]
    loss: GradientEdge | None


class Work:
    """What actions mean for the stages of one rank; what is not overridden does nothing."""

    def forward(self, stage: str, microbatch: int, inputs: Mapping[Edge, Tensor]) -> Made:
        """Compute a stage; ``inputs`` are leaves that gather gradients."""
        raise NotImplementedError

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        """Launch a transfer, of ``value`` from its source; what is returned waits, and gives what came."""
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
    """The list of one pipeline rank.

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
        graph = schedule.graph
        self._into = {s: tuple(e for e in graph.edges if e.target == s) for s in graph.at(rank)}
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
        self._values: dict[tuple[Edge, int, bool], Tensor] = {}  # edge, microbatch, backward
        self._flying: dict[tuple[Edge, int, bool], Callable[[], Tensor | None]] = {}
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

    def _receives(self, action: Action) -> bool:
        """Whether the reading end of a transfer is here."""
        return bool(action.target) and ((action.unit if action.back else action.target) in self._into)

    def _count(self, change: int) -> None:
        self._live += change
        self.peak = max(self.peak, self._live)

    def _forward(self, action: Action) -> None:
        key = action.unit, action.microbatch
        inputs = {edge: self._values.pop((edge, key[1], False)) for edge in self._into[key[0]]}
        training = torch.is_grad_enabled()
        for value in inputs.values() if training else ():
            value.requires_grad_()
        self.work.enter(key, late=False)
        with self._keeping(key) if training else nullcontext():
            made = self.work.forward(*key, inputs)
        for edge, value in made.outputs.items():
            self._values[edge, key[1], False] = value.detach()
        if training:
            ends = {edge: get_gradient_edge(value) for edge, value in made.outputs.items()}
            loss = None if made.loss is None else get_gradient_edge(made.loss)
            self._passes[key] = _Pass(inputs, ends, loss)
            self._count(1)

    def _keeping(self, key: Key) -> AbstractContextManager[Any]:
        if key not in self._moved:
            return nullcontext()
        self._kept[key] = Kept(self.work.parameters(), self._copies)
        return self._kept[key].hooks()

    def _backward(self, action: Action) -> None:
        key = action.unit, action.microbatch
        inputs, outputs, loss = self._passes.pop(key)
        ends, grads = list(outputs.values()), list[Tensor | None]()
        grads += [self._values.pop((edge, key[1], True)) for edge in outputs]
        if loss is not None:
            ends, grads = [*ends, loss], [*grads, None]
        whole = self._whole == key
        self.work.enter(key, late=not whole)
        with nullcontext() if whole else self.late.defer(key):
            torch.autograd.backward(ends, grads)
        self._kept.pop(key, None)  # what W still needs is in the queue
        for edge, leaf in inputs.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self._values[edge, key[1], True] = gradient
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
        value = None if self._receives(action) else self._values.pop(place)
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
