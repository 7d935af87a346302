"""When each action of a schedule ran: measured by the executor or foretold by the simulator, in one type.

There is one span for each action of each rank. F, B, W and STEP are busy on the stream ``compute``, where a
WAIT is the time that the rank was blocked and FREE has no length. A transfer is the span of its POST, on
``send`` at one end and on ``receive`` at the other. GATHER and REDUCE run on ``store``, OUT on ``out`` and IN
on ``in``. Where a B is directly followed by its W, the span of B is the whole backward pass and that of W,
at its end, has no length.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from weft.plan.schedule import COMPUTE, Action, action

Row = tuple[int, str, str, float, float]
STREAMS = ("compute", "send", "receive", "store", "out", "in")
_STREAM: Mapping[str, str] = MappingProxyType(
    {"POST": "send", "GATHER": "store", "REDUCE": "store", "OUT": "out", "IN": "in"}
)


def stream_of(done: Action, receives: bool = False) -> str:
    """The stream that an action belongs to; ``receives`` says on which end of its edge a POST is."""
    return "receive" if receives and done.op == "POST" else _STREAM.get(done.op, "compute")


class Span(NamedTuple):
    """One action of one rank, from ``start`` to ``end`` seconds."""

    rank: int
    stream: str
    action: Action
    start: float
    end: float


class Level(NamedTuple):
    """From this moment on, so much is live."""

    time: float
    value: float


@dataclass(frozen=True)
class Timeline:
    """Spans of one step.

    Attributes:
        spans: those of one rank in the order of its list.
    """

    spans: tuple[Span, ...]

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[int | str | float]]) -> "Timeline":
        """The inverse of ``as_rows``, also after a trip through JSON.

        Raises:
            ValueError: an action is not one.
        """
        made: list[Span] = []
        for rank, stream, text, start, end in rows:
            made.append(Span(int(rank), str(stream), action(str(text)), float(start), float(end)))
        return cls(tuple(made))

    def as_rows(self) -> list[Row]:
        """What JSON can hold: rank, stream, text of the action, start and end of each span."""
        return [(span.rank, span.stream, str(span.action), span.start, span.end) for span in self.spans]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that did something, ascending."""
        return tuple(sorted({span.rank for span in self.spans}))

    @cached_property
    def start(self) -> float:
        """When the first action began; 0 where there is none."""
        return min((span.start for span in self.spans), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0) - self.start

    @cached_property
    def busy(self) -> Mapping[int, float]:
        """Seconds that each rank spent in F, B and W."""
        found = dict.fromkeys(self.ranks, 0.0)
        for span in self.spans:
            if span.action.op in COMPUTE:
                found[span.rank] += span.end - span.start
        return MappingProxyType(found)

    @property
    def busy_shares(self) -> Mapping[int, float]:
        """``busy`` of each rank over the makespan."""
        return MappingProxyType({rank: time / (self.makespan or 1.0) for rank, time in self.busy.items()})

    @property
    def bubble_share(self) -> float:
        """1 - busy / (ranks * makespan): the part of all time in which no rank's F, B or W runs."""
        return 1.0 - sum(self.busy_shares.values()) / max(1, len(self.ranks))

    def live(self, size: Callable[[str], float] | None = None) -> Mapping[int, tuple[Level, ...]]:
        """What forward passes keep on each rank over time, in units of ``size(stage)`` (default: 1 each).

        A microbatch is live from the start of its F to the end of its W, without the time from the end of OUT
        to the start of IN; nothing is kept of stages that have no W, as they are frozen. So the greatest
        value is that of ``prove``, plus what an OUT that takes time has not moved yet when the next F starts.
        """
        changes: defaultdict[int, list[Level]] = defaultdict(list)
        kept = {(span.rank, span.action.unit) for span in self.spans if span.action.op == "W"}
        for rank, _, (op, stage, *_), start, end in self.spans:
            if op in ("F", "IN") and (rank, stage) in kept:
                changes[rank].append(Level(start, size(stage) if size else 1.0))
            elif op in ("W", "OUT"):
                changes[rank].append(Level(end, -(size(stage) if size else 1.0)))
        return MappingProxyType({rank: _summed(changes[rank]) for rank in self.ranks})

    def peaks(self, size: Callable[[str], float] | None = None) -> Mapping[int, float]:
        """The greatest value of ``live`` on each rank."""
        levels = self.live(size)
        return MappingProxyType(
            {rank: max((at.value for at in levels[rank]), default=0.0) for rank in levels}
        )

    def shifted(self, seconds: float) -> "Timeline":
        """The same, so many seconds later."""
        moved = (span._replace(start=span.start + seconds, end=span.end + seconds) for span in self.spans)
        return Timeline(tuple(moved))


def merged(parts: Iterable[Timeline], meet: bool = False) -> Timeline:
    """Timelines of different ranks as one that starts at 0.

    ``meet`` first moves each part so that their last ends coincide: STEP, a collective of all ranks, ends on
    all of them at about the same time, but the clocks of different machines do not agree.
    """
    parts = list(parts)
    if meet:
        parts = [part.shifted(-part.start - part.makespan) for part in parts]
    whole = Timeline(tuple(span for part in parts for span in part.spans))
    return whole.shifted(-whole.start)


def _summed(changes: list[Level]) -> tuple[Level, ...]:
    """Running sums; changes at the same moment keep their order, so that a W makes room for the next F."""
    value, levels = 0.0, list[Level]()
    for time, change in sorted(changes, key=lambda level: level.time):
        value += change
        levels.append(Level(time, value))
    return tuple(levels)
