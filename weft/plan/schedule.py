"""Schedules are data: for each seat, the list of what it does, in order.

A seat is the ranks that have the same stages: a pipeline rank, or the part of one that has an encoder too.
An action names an op, the unit (a stage) or edge it is about, and an index: the microbatch, or the group of
microbatches that a stage takes at a time. As text: ``F(0,3)`` is the
forward pass of stage 0 on microbatch 3, ``POST(0>1,3)`` launches the transfer of its result to stage 1,
``POST(0<1,3)`` that of the gradient on its way back, ``GATHER(0)`` and ``STEP`` have no microbatch.

    F, B, W            forward; gradients of inputs; gradients of weights (B right before its W is one pass)
    POST, WAIT         launch a transfer over an edge; block until it is over; on all seats of both ends
    GATHER, FREE       make the parameters of a stage whole; give their memory back
    REDUCE, STEP       sum the gradients of a stage over ranks; norm, update, publish
    OUT, IN            move what a forward pass keeps to the host; bring it back

The checker (``prove``), the executor (``weft.parallel.executor``), the simulator (``simulate``) and the
pictures read the same lists.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

Op = Literal["F", "B", "W", "POST", "WAIT", "GATHER", "FREE", "REDUCE", "STEP", "OUT", "IN"]
COMPUTE = ("F", "B", "W")
OPS: tuple[str, ...] = get_args(Op)
_UNIT = r"(?P<source>\w+)(?:(?P<arrow>[<>])(?P<target>\w+))?"
_FORM = re.compile(rf"(?P<op>[A-Z]+)(?:\({_UNIT}(?:,(?P<index>\d+))?\))?")
_NEEDS_EDGE, _NEEDS_INDEX = ("POST", "WAIT"), ("F", "B", "W", "POST", "WAIT", "OUT", "IN")


class Edge(NamedTuple):
    """What ``source`` makes and ``target`` reads."""

    source: str
    target: str


class Action(NamedTuple):
    """One thing that a seat does.

    Attributes:
        op: what.
        unit: the stage, or the source of the edge; empty for STEP.
        microbatch: or the group of them, where the stage takes several at a time; -1 where there is none.
        target: of the edge, for POST and WAIT.
        back: whether gradients travel, from target to source.
    """

    op: Op
    unit: str = ""
    microbatch: int = -1
    target: str = ""
    back: bool = False

    @property
    def edge(self) -> Edge:
        """Of POST and WAIT."""
        return Edge(self.unit, self.target)

    def __str__(self) -> str:
        unit = f"{self.unit}{'<' if self.back else '>'}{self.target}" if self.target else self.unit
        words = ",".join([*filter(None, [unit]), *([str(self.microbatch)] if self.microbatch >= 0 else [])])
        return f"{self.op}({words})" if words else self.op


def action(text: str) -> Action:
    """The action of a text such as ``F(0,3)``.

    Raises:
        ValueError: not of that form.
    """
    found = _FORM.fullmatch(text)
    if found is None or found["op"] not in OPS:
        raise ValueError(
            f"{text!r} is not an action like F(0,3), POST(0>1,3), WAIT(0<1,3), GATHER(0) or STEP"
        )
    made = Action(
        found["op"],  # pyright: ignore[reportArgumentType]
        found["source"] or "",
        int(found["index"] or -1),
        found["target"] or "",
        found["arrow"] == "<",
    )
    edge, index = made.op in _NEEDS_EDGE, made.op in _NEEDS_INDEX
    if bool(made.target) != edge or (made.microbatch >= 0) != index or bool(made.unit) == (made.op == "STEP"):
        form = f"{made.op}({'0>1' if edge else '0'}{',3' if index else ''})" if made.op != "STEP" else "STEP"
        raise ValueError(f"{text!r} is not of the form {form}")
    return made


Lists = tuple[tuple[Action, ...], ...]
Cost = Callable[[Action], float]


def _nothing() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Graph:
    """Stages, where each runs, and what goes between them.

    A stage of several seats that is not joined runs on each of them by itself; only its REDUCE is one of all.

    Attributes:
        home: seats of each stage, ascending; a stage comes after those that it reads.
        edges: between stages. The ends of an edge have the same seats, and then hand over what they make, or
            none in common, or they are routed.
        every: microbatches that a stage takes at a time, where that is not 1; the last group may be smaller.
            Of the two ends of an edge one divides the other, and a transfer has as many as the smaller.
        frozen: stages without gradients: nothing trainable is in them or before them.
        routed: edges whose ends exchange rows between ranks, also inside a seat.
        joined: stages whose passes hold collectives over several of their seats: these do each F, B, W,
            GATHER and REDUCE of the stage together.
        ahead: passes of a frozen stage that may be ahead of the last one that was read everywhere; none
            named, any number.
    """

    home: Mapping[str, tuple[int, ...]]
    edges: tuple[Edge, ...]
    every: Mapping[str, int] = field(default_factory=_nothing)
    frozen: frozenset[str] = frozenset()
    routed: frozenset[Edge] = frozenset()
    joined: frozenset[str] = frozenset()
    ahead: Mapping[str, int] = field(default_factory=_nothing)

    @classmethod
    def chain(cls, ranks: Iterable[int]) -> "Graph":
        """Stages ``0``, ``1``, ... one after the other, each on one of these seats."""
        home = {str(stage): (rank,) for stage, rank in enumerate(ranks)}
        names = list(home)
        edges = tuple(Edge(*pair) for pair in zip(names, names[1:], strict=False))
        return cls(MappingProxyType(home), edges)

    @property
    def seats(self) -> int:
        """Number of seats."""
        return 1 + max(seat for seats in self.home.values() for seat in seats)

    def at(self, seat: int) -> tuple[str, ...]:
        """Stages of a seat."""
        return tuple(stage for stage, seats in self.home.items() if seat in seats)

    def crosses(self, edge: Edge) -> bool:
        """Whether something is sent, as the ends are on different seats or laid out differently."""
        return edge in self.routed or self.home[edge.source] != self.home[edge.target]

    def returns(self, edge: Edge) -> bool:
        """Whether gradients come back over an edge."""
        return edge.source not in self.frozen

    def party(self, edge: Edge) -> tuple[int, ...]:
        """Seats of both ends, ascending: all that launch a transfer and wait for it."""
        return tuple(sorted({*self.home[edge.source], *self.home[edge.target]}))

    def meeting(self, done: Action) -> tuple[int, ...]:
        """Seats that do an action together; none where each does it by itself."""
        if done.op == "STEP":
            return tuple(range(self.seats))
        seats = self.home.get(done.unit, ())
        whole = done.unit in self.joined and done.op in ("F", "B", "W", "GATHER", "REDUCE")
        return seats if len(seats) > 1 and (whole or done.op == "REDUCE") else ()

    def size(self, stage: str) -> int:
        """Microbatches of a pass."""
        return self.every.get(stage, 1)

    def passes(self, stage: str, microbatches: int) -> int:
        """Passes of a stage in a step."""
        return -(-microbatches // self.size(stage))

    def transfers(self, edge: Edge, microbatches: int) -> int:
        """Transfers of an edge in a step, in one direction."""
        return max(self.passes(stage, microbatches) for stage in edge)

    def parts(self, edge: Edge, stage: str, index: int, microbatches: int) -> range:
        """Transfers of an edge that are of one pass of one of its ends."""
        ratio = self.size(stage) // min(map(self.size, edge))
        return range(index * ratio, min((index + 1) * ratio, self.transfers(edge, microbatches)))

    def part(self, edge: Edge, stage: str, transfer: int) -> int:
        """The pass of one end of an edge that a transfer is of."""
        return transfer * min(map(self.size, edge)) // self.size(stage)

    def needs(self, seat: int, done: Action, microbatches: int) -> Iterator[tuple[int, Action]]:
        """Passes of other stages, with their seats, without which an F or B of a seat cannot begin."""
        _, stage, index, *_ = done
        for edge in self.edges:
            other, parts = edge.source, range(0)
            if done.op == "F" and edge.target == stage:
                parts = self.parts(edge, stage, index, microbatches)
            elif done.op == "B" and edge.source == stage:
                other, parts = edge.target, self.parts(edge, stage, index, microbatches)
            elif done.op == "F" and edge.source == stage and index >= self.ahead.get(stage, microbatches):
                other, parts = edge.target, self.parts(edge, stage, index - self.ahead[stage], microbatches)
            for part in dict.fromkeys(self.part(edge, other, part) for part in parts):
                for each in self.home[other] if self.crosses(edge) else (seat,):
                    yield each, Action(done.op, other, part)


@dataclass(frozen=True)
class Schedule:
    """What every seat does in one step.

    Attributes:
        graph: the stages.
        microbatches: of a step.
        lists: of each seat.
    """

    graph: Graph
    microbatches: int
    lists: Lists

    @cached_property
    def text(self) -> str:
        """One line for each seat."""
        return "".join(" ".join(map(str, actions)) + "\n" for actions in self.lists)
