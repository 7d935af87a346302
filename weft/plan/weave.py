"""Weaves encoders into the decoder's lists: from what pipeline ranks compute to what seats compute.

The decoder's passes keep the order of their pipeline rank. Those of encoders come between them, where a
simulation in time puts them by one of three orders:

    first     every forward pass before the decoder's first pass, every backward pass after its last
    lead      forward passes as late as the decoder can use them, backward passes as soon as they can run
    bubble    both where the seat would be idle, as long as the decoder does not wait for them

As lists are what a simulated execution did, with passes of joined stages begun by all their seats in one
moment, they run without a deadlock wherever the decoder's lists do.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, NamedTuple

from weft.plan.pipelines import names_encoders
from weft.plan.schedule import COMPUTE, Action, Cost, Edge, Graph, Lists

Order = Literal["lead", "first", "bubble"]
Block = tuple[Action, ...]
"""What a seat does in one piece: a pass, or B and the W that follows it."""
_SETTING = "plan.schedule.encoder_groups_in_flight"


@dataclass(frozen=True)
class Tower:
    """An encoder.

    Attributes:
        name: such as ``vision``.
        stages: ``vision_0``, ``vision_1``, ..., one after the other; the last one feeds the decoder.
        seats: of each stage, ascending.
        every: microbatches of a group.
        frozen: whether it has no gradients.
        joined: stages whose passes hold collectives over several seats.
    """

    name: str
    stages: tuple[str, ...]
    seats: tuple[tuple[int, ...], ...]
    every: int = 1
    frozen: bool = False
    joined: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Loom:
    """Where everything of a model with encoders runs.

    Attributes:
        decoder: its stages on pipeline ranks; the first one reads the encoders.
        seats_of: seats of each pipeline rank, which all run the pipeline rank's list.
        towers: the encoders.
        joined: stages of the decoder whose passes hold collectives over several seats.
    """

    decoder: Graph
    seats_of: tuple[tuple[int, ...], ...]
    towers: tuple[Tower, ...] = ()
    joined: frozenset[str] = frozenset()

    @property
    def reader(self) -> str:
        """The stage of the decoder that reads the encoders."""
        return next(iter(self.decoder.home))

    @property
    def graph(self) -> Graph:
        """All stages on their seats; those of encoders first."""
        home = {
            stage: seats
            for tower in self.towers
            for stage, seats in zip(tower.stages, tower.seats, strict=True)
        }
        home |= {stage: self.seats_of[rank] for stage, (rank,) in self.decoder.home.items()}
        inside = [Edge(*pair) for tower in self.towers for pair in pairwise(tower.stages)]
        routed = [Edge(tower.stages[-1], self.reader) for tower in self.towers]
        frozen = [stage for tower in self.towers if tower.frozen for stage in tower.stages]
        every = {stage: tower.every for tower in self.towers for stage in tower.stages}
        return Graph(
            MappingProxyType(home),
            (*inside, *routed, *self.decoder.edges),
            MappingProxyType(every),
            frozenset(frozen),
            frozenset(routed),
            self.joined.union(*(tower.joined for tower in self.towers)),
        )

    def least(self, tower: Tower, lists: Lists, microbatches: int) -> int:
        """Groups of a tower that the decoder's lists need in flight at once."""
        if tower.frozen:
            return 1
        (rank,) = self.decoder.home[self.reader]
        last = [len(lists[rank])] * -(-microbatches // tower.every)
        ends = {done[1:3]: at for at, done in enumerate(lists[rank]) if done.op == "B"}
        for group in range(len(last)):
            passes = range(group * tower.every, min((group + 1) * tower.every, microbatches))
            last[group] = max(ends.get((self.reader, i), len(lists[rank])) for i in passes)
        reads = [(at, done) for at, done in enumerate(lists[rank]) if done[:2] == ("F", self.reader)]
        return max(
            (sum(end > at for end in last[: done.microbatch // tower.every + 1]) for at, done in reads),
            default=1,
        )


def weave(
    loom: Loom, lists: Lists, order: Order, ahead: int, microbatches: int, cost: Cost
) -> tuple[Graph, Lists]:
    """The graph of all stages, and the F, B and W of each seat.

    Lists of seats that name encoders are taken as they are.

    Args:
        loom: where everything runs.
        lists: F, B and W of the decoder, of each pipeline rank.
        order: when encoders run.
        ahead: most groups of an encoder between F and its W (of a frozen one, and the decoder's F that reads
            it); 0: all for ``first``, else as few as the lists can do with, and one more for each stage of
            the encoder that has seats other than those of the decoder's first stage, as they work meanwhile.
        microbatches: of a step.
        cost: of F, B and W of each stage, in any unit, of encoders by group.

    Raises:
        ValueError: a bound that the lists cannot do with, or lists that are complete but for encoders.
    """
    graph = loom.graph
    if names_encoders(lists):
        return graph, lists
    if other := next((done for actions in lists for done in actions if done.op not in COMPUTE), None):
        raise ValueError(
            f"{other} is in lists without encoders: write F, B and W of the decoder, or all of every seat"
        )
    limits = {tower.name: _limit(loom, tower, lists, order, ahead, microbatches) for tower in loom.towers}
    frozen = {s: limits[tower.name] for tower in loom.towers if tower.frozen for s in tower.stages}
    graph = replace(graph, ahead=MappingProxyType(frozen))
    rules = {
        "first": [_Rule("first")],
        "lead": [_Rule("lead")],
        "bubble": [
            _Rule("lead"),
            *(_Rule("bubble", share, urgent) for share in (1.0, 0.5, 0.0) for urgent in (True, False)),
        ],
    }[order]
    tries = [_Weaver(loom, graph, lists, limits, cost, rule, microbatches) for rule in rules]
    best = min(tries, key=_Weaver.makespan)
    return graph, tuple(map(tuple, best.made))


def _limit(loom: Loom, tower: Tower, lists: Lists, order: Order, ahead: int, microbatches: int) -> int:
    """Groups in flight of a tower."""
    groups = -(-microbatches // tower.every)
    least = groups if order == "first" else loom.least(tower, lists, microbatches)
    if ahead and ahead < least:
        raise ValueError(
            f"{ahead} groups of {tower.name} in flight, but these lists need {least} at once "
            f"({groups} groups of {tower.every} in a step, order {order}); set {_SETTING} to {least} or 0"
        )
    read = loom.graph.home[loom.reader]
    apart = sum(not set(seats) <= set(read) for seats in tower.seats)
    return min(groups, ahead or least + apart)


class _Rule(NamedTuple):
    """How to choose: ``share`` of its cost that an encoder's pass must find idle, in a bubble; ``urgent``: it
    goes first where the decoder wants it."""

    order: Order
    share: float = 1.0
    urgent: bool = False


class _Weaver:
    """An execution in time; transfers take none.

    Attributes:
        made: what each seat did, in order.
    """

    def __init__(
        self,
        loom: Loom,
        graph: Graph,
        lists: Lists,
        limits: Mapping[str, int],
        cost: Cost,
        rule: _Rule,
        microbatches: int,
    ) -> None:
        self.made: list[list[Action]] = [[] for _ in range(graph.seats)]
        self._graph, self._rule, self._cost, self._limits = graph, rule, cost, limits
        self._microbatches, self._reader, self._towers = microbatches, loom.reader, loom.towers
        self._left: list[deque[Block]] = [deque() for _ in self.made]  # of the decoder
        for rank, seats in enumerate(loom.seats_of):
            for seat in seats:
                self._left[seat].extend(_blocks(lists[rank]))
        (rank,) = loom.decoder.home[loom.reader]
        self._back = {
            tower.name: _turns(tower, loom.reader, lists[rank], microbatches) for tower in loom.towers
        }
        # Passes that each seat has begun of each stage: next F, next B.
        self._next: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._over: dict[tuple[int, Action], float] = {}  # when what seats have begun ends
        self._needs: dict[tuple[int, Action], tuple[tuple[int, Action], ...]] = {}
        self._free = [0.0] * len(self.made)
        self._claim: list[Block | None] = [None] * len(self.made)

    def makespan(self) -> float:
        """Runs everything; returns when the last seat is through (infinite if that does not come)."""
        awake = [0.0]
        while awake:
            now = heapq.heappop(awake)
            while sum(self._start(seat, now, awake) for seat in range(len(self.made))):
                pass
        return max(self._free) if self._complete() else float("inf")

    def _complete(self) -> bool:
        """Put what could not run at the end, for the proof to tell why."""
        whole = not any(self._left)
        for seat, left in enumerate(self._left):
            self.made[seat] += (done for block in left for done in block)
            for tower, stage in self._stages(seat):
                for op in "FB":
                    while block := self._encoder(seat, tower, stage, op, bound=False):
                        whole = False
                        self.made[seat] += block
                        self._next[op, stage, seat] += 1
        return whole

    def _stages(self, seat: int) -> Iterator[tuple[Tower, str]]:
        for tower in self._towers:
            for stage, seats in zip(tower.stages, tower.seats, strict=True):
                if seat in seats:
                    yield tower, stage

    def _encoder(self, seat: int, tower: Tower, stage: str, op: str, *, bound: bool = True) -> Block:
        """The next pass of an encoder's stage, if there is one and its turn has come."""
        begun, back = self._next["F", stage, seat], self._next["B", stage, seat]
        groups = -(-self._microbatches // tower.every)
        if op == "F":
            room = tower.frozen or not bound or begun - back < self._limits[tower.name]
            return (Action("F", stage, begun),) if begun < groups and room else ()
        if tower.frozen or back == groups or (self._back[tower.name][back] >= begun):
            return ()
        group = self._back[tower.name][back]
        return Action("B", stage, group), Action("W", stage, group)

    def _start(self, seat: int, now: float, awake: list[float]) -> bool:
        """Begin what a seat does next, if it is free, with all seats that do it too."""
        if self._free[seat] > now:
            return False
        if self._claim[seat] is None:
            for block in self._tasks(seat, now):
                seats = self._graph.meeting(block[0]) or (seat,)
                if max(self._arrival(other, block) for other in seats) <= now and self._agree(
                    block, seats, seat, now
                ):
                    for other in seats:
                        self._claim[other] = block
                    break
        block = self._claim[seat]
        seats = () if block is None else self._graph.meeting(block[0]) or (seat,)
        if block is None or any(self._free[other] > now for other in seats):
            return False
        end = now + sum(map(self._cost, block))
        for other in seats:
            self._begin(other, block, end)
        heapq.heappush(awake, end)
        return True

    def _agree(self, block: Block, seats: Sequence[int], seat: int, now: float) -> bool:
        """Whether all other seats may do it next."""
        others = [other for other in seats if other != seat]
        return all(self._claim[other] is None and block in self._tasks(other, now) for other in others)

    def _begin(self, seat: int, block: Block, end: float) -> None:
        self.made[seat] += block
        self._free[seat], self._claim[seat] = end, None
        if self._left[seat] and self._left[seat][0] == block:
            self._left[seat].popleft()
        for done in block:
            self._over[seat, done] = end
        self._next[block[0].op, block[0].unit, seat] += 1

    def _arrival(self, seat: int, block: Block) -> float:
        """When all that a seat reads is there; infinite while that is not known."""
        key = seat, block[0]
        if key not in self._needs:
            self._needs[key] = tuple(self._graph.needs(*key, self._microbatches))
        return max((self._over.get(need, float("inf")) for need in self._needs[key]), default=0.0)

    def _tasks(self, seat: int, now: float) -> list[Block]:
        """What a seat may do next, best first, whether it can run or not."""
        towers = list(self._stages(seat))
        forward = [
            (block[0].microbatch * each[0].every, block, each)
            for each in towers
            if (block := self._encoder(seat, *each, "F"))
        ]
        forward.sort(key=lambda entry: entry[0])
        backward = [block for each in towers if (block := self._encoder(seat, *each, "B"))]
        head = [self._left[seat][0]] if self._left[seat] else []
        every = [block for _, block, _ in forward]
        if self._rule.order == "first":
            return every or head or backward
        wanted = [block for _, block, each in forward if not head or self._wanted(seat, block, *each)]
        if self._rule.order == "lead":
            return [*backward, *wanted, *head]
        idle = self._arrival(seat, head[0]) - now if head else float("inf")
        fill = [b for b in (*backward, *every) if idle > 0 and idle >= self._rule.share * self._spent(b)]
        return [*(wanted if self._rule.urgent else ()), *head, *fill]

    def _spent(self, block: Block) -> float:
        return sum(map(self._cost, block))

    def _wanted(self, seat: int, block: Block, tower: Tower, stage: str) -> bool:
        """Whether the decoder cannot go on without a forward pass of an encoder for long."""
        group, later = block[0].microbatch, len(tower.stages) - 1 - tower.stages.index(stage)
        read = self._graph.home[self._reader]
        if seat in read and not later:
            head = self._left[seat][0][0]
            return head[:2] == ("F", self._reader) and group <= head.microbatch // tower.every
        begun = min(self._next["F", self._reader, other] for other in read)
        return group <= begun // tower.every + later


def _blocks(actions: Sequence[Action]) -> Iterator[Block]:
    """A B with the W right after it in one."""
    last: Block = ()
    for done in actions:
        if last and done.op == "W" and last == (done._replace(op="B"),):
            yield (*last, done)
            last = ()
        else:
            if last:
                yield last
            last = (done,)
    if last:
        yield last


def _turns(tower: Tower, reader: str, actions: Sequence[Action], microbatches: int) -> tuple[int, ...]:
    """Groups in the order in which their gradients are complete; the same on all seats."""
    ends = dict.fromkeys(range(-(-microbatches // tower.every)), len(actions))
    for at, done in enumerate(actions):
        if done[:2] == ("B", reader) and done.microbatch < microbatches:
            ends[done.microbatch // tower.every] = at
    return tuple(sorted(ends, key=lambda group: (ends[group], group)))
