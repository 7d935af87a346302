"""Schedules are data: for each pipeline rank, the list of what it does, in order.

An action names an op, the unit (a stage) or edge it is about, and a microbatch. As text: ``F(0,3)`` is the
forward pass of stage 0 on microbatch 3, ``POST(0>1,3)`` launches the transfer of its result to stage 1,
``POST(0<1,3)`` that of the gradient on its way back, ``GATHER(0)`` and ``STEP`` have no microbatch.

    F, B, W            forward; gradients of inputs; gradients of weights (B right before its W is one pass)
    POST, WAIT         launch a transfer over an edge, on both ends; block until it is over, on both ends
    GATHER, FREE       make the parameters of a stage whole; give their memory back
    REDUCE, STEP       sum the gradients of a stage over ranks; norm, update, publish
    OUT, IN            move what a forward pass keeps to the host; bring it back

The checker (``prove``), the executor (``weft.parallel.executor``), the simulator (``simulate``) and the
pictures read the same lists.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """One thing that a rank does.

    Attributes:
        op: what.
        unit: the stage, or the source of the edge; empty for STEP.
        microbatch: -1 where there is none.
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


@dataclass(frozen=True)
class Graph:
    """Stages, where each runs, and what goes between them.

    Attributes:
        home: pipeline rank of each stage, stages in the order of the model.
        edges: between stages, on the same pipeline rank or not.
    """

    home: Mapping[str, int]
    edges: tuple[Edge, ...]

    @classmethod
    def chain(cls, ranks: Iterable[int]) -> "Graph":
        """Stages ``0``, ``1``, ... one after the other, on these pipeline ranks."""
        home = {str(stage): rank for stage, rank in enumerate(ranks)}
        names = list(home)
        edges = tuple(Edge(*pair) for pair in zip(names, names[1:], strict=False))
        return cls(MappingProxyType(home), edges)

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return 1 + max(self.home.values())

    def at(self, rank: int) -> tuple[str, ...]:
        """Stages of a pipeline rank."""
        return tuple(stage for stage, home in self.home.items() if home == rank)

    def crosses(self, edge: Edge) -> bool:
        """Whether the ends are different pipeline ranks, so that something is sent."""
        return self.home[edge.source] != self.home[edge.target]


@dataclass(frozen=True)
class Schedule:
    """What every pipeline rank does in one step.

    Attributes:
        graph: the stages.
        microbatches: of a step.
        lists: of each pipeline rank.
    """

    graph: Graph
    microbatches: int
    lists: Lists

    @cached_property
    def text(self) -> str:
        """One line for each pipeline rank."""
        return "".join(" ".join(map(str, actions)) + "\n" for actions in self.lists)
