"""Puts into lists of F, B and W what they need: transfers, gathers, reductions, offload.

Between two computations everything stands in this order (``order.ORDER``): first what follows from the
earlier one, launches before waits; then launches for a later one; last the waits of the next one.

- A result is sent right after it is made. Who only sends waits for a transfer only where it can know that it
  is over: after a computation that needs, by way of other seats, what the receivers made of it. So senders
  never block, and a list is free of deadlock as soon as its F, B and W are. Only a frozen stage that may not
  run ahead any further waits until its readers are there.
- Who only receives launches ``lookahead`` computations early and waits right before the use. Launches of a
  channel have the order of the sender, which is earlier where the uses have another order; and they come
  before the first use of any receiver, as a transfer is over only when all have launched it.
- Who does both launches right after its own result, and waits right before the use.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm

from weft.plan.order import Blocks, Spot, clocks_of
from weft.plan.schedule import COMPUTE, Action, Cost, Edge, Graph, Lists, Schedule


def complete(
    graph: Graph,
    lists: Lists,
    *,
    level: int = 0,
    gather: str = "unit",
    resident: int = 0,
    lookahead: int = 1,
    split: bool = False,
    cost: Cost = lambda _: 1.0,
) -> Schedule:
    """A schedule from what each seat computes. Lists that hold anything but F, B and W are taken as they are.

    Args:
        graph: the stages. Their microbatches are counted from the lists.
        lists: of each seat.
        level: of the store.
        gather: "stage" if at level 3 parameters are made whole for a run of uses of a stage.
        resident: most passes of its stages that a seat keeps on the device; 0 if there is no bound.
        lookahead: computations before its use that a receive or gather is launched.
        split: send the gradient between B and a W that follows it; else the two are one pass.
        cost: of F, B and W: what several seats receive, all launch before one needs it at these costs.

    Raises:
        ValueError: fewer residents than the lists can do with.
    """
    passes = (done for actions in lists for done in actions if done.op in COMPUTE)
    microbatches = 1 + max((done.microbatch * graph.size(done.unit) for done in passes), default=0)
    if any(done.op not in COMPUTE for actions in lists for done in actions):
        return Schedule(graph, microbatches, lists)
    sends = {e.target for e in graph.edges if graph.crosses(e) and graph.returns(e)} if split else set[str]()
    made = [Blocks(actions, sends) for actions in lists]
    clocks, spots = clocks_of(graph, made, microbatches, cost)

    def sent(seat: int, stage: str, index: int, uses: Mapping[int, int]) -> int:
        known, mine = len(made[seat].blocks), clocks[seat]
        over = [bisect_right(mine, use, key=lambda clock: clock[at]) for at, use in uses.items()]
        known = max(over) + 1 if uses and max(over) < len(mine) else known
        later = Action("F", stage, index + graph.ahead.get(stage, microbatches))
        return min(known, made[seat].index.get(later, known))

    _Transfers(graph, made, microbatches, lookahead, spots, sent).put()
    if gather == "stage" and level == 3:
        _gathers(graph, made, lookahead)
    _reductions(graph, made, every=gather == "stage" and level >= 2)
    for seat, each in enumerate(made):
        if resident:
            _offload(each, resident, seat, graph.frozen)
        each.put(len(each.blocks), "STEP", Action("STEP"))
    return Schedule(graph, microbatches, tuple(tuple(each.merged()) for each in made))


def forward_only(
    graph: Graph, microbatches: int, *, level: int = 0, gather: str = "unit", lookahead: int = 1
) -> Schedule:
    """A schedule without B, W, REDUCE and STEP, for evaluation; no stage may need one that comes later.

    A seat takes its stages in turn, a round of at least as many microbatches as there are seats each, in
    whole groups. Who only sends waits for the transfers of a round two rounds later, so that it holds few of
    them; what the receivers do until then needs nothing that the sender does after.
    """
    group = lcm(*map(graph.size, graph.home))
    length = -(-graph.seats // group) * group
    turns = [
        Action("F", stage, i)
        for start in range(0, microbatches, length)
        for stage in graph.home
        for i in range(start // graph.size(stage), graph.passes(stage, min(start + length, microbatches)))
    ]
    made = [Blocks(a for a in turns if seat in graph.home[a.unit]) for seat in range(graph.seats)]
    place = {done: at for at, done in enumerate(turns)}
    spots = [[(place[block[0]], place[block[0]] + 1.0) for block in each.blocks] for each in made]

    def turn(block: Sequence[Action]) -> int:
        return block[0].microbatch * graph.size(block[0].unit) // length

    def sent(seat: int, stage: str, index: int, _: Mapping[int, int]) -> int:
        return bisect_left(made[seat].blocks, index * graph.size(stage) // length + 2, key=turn)

    _Transfers(graph, made, microbatches, lookahead, spots, sent).put()
    if gather == "stage" and level == 3:
        _gathers(graph, made, lookahead)
    return Schedule(graph, microbatches, tuple(tuple(each.merged()) for each in made))


@dataclass(frozen=True)
class _Transfers:
    """POST and WAIT of all edges.

    Attributes:
        graph, made, microbatches, lookahead: as given.
        spots: when each seat's blocks begin and end.
        sent: the gap of the WAIT of a seat that only sends, from the seat, the stage and pass that made it,
            and the blocks of the seats that use what was sent.
    """

    graph: Graph
    made: Sequence[Blocks]
    microbatches: int
    lookahead: int
    spots: Sequence[Sequence[Spot]]
    sent: Callable[[int, str, int, Mapping[int, int]], int]

    def put(self) -> None:
        """Of every edge over which something is sent, in both directions."""
        for edge in filter(self.graph.crosses, self.graph.edges):
            self._edge(edge, back=False)
            if self.graph.returns(edge):
                self._edge(edge, back=True)

    def _edge(self, edge: Edge, *, back: bool) -> None:
        source, target = (edge.target, edge.source) if back else edge
        makers = {seat: self._blocks(seat, edge, source, back) for seat in self.graph.home[source]}
        users = {seat: self._blocks(seat, edge, target, back) for seat in self.graph.home[target]}
        for seat, blocks in makers.items():
            self._send(seat, blocks, users, (edge, back))
        order = list(next(iter(makers.values())))
        for seat, blocks in users.items():
            for part, use in blocks.items():
                self.made[seat].put(use, "received", _post(edge, part, back)._replace(op="WAIT"))
            if seat not in makers:
                parts = [*(i for i in order if i in blocks), *(i for i in blocks if i not in order)]
                self._receive(seat, parts, users, (edge, back))

    def _blocks(self, seat: int, edge: Edge, stage: str, back: bool) -> dict[int, int]:
        """Of each transfer, the block that makes or uses it, in the order of the list."""
        graph, found = self.graph, self.made[seat].index.items()
        passes = (
            (done, at) for done, at in found if done.unit == stage and done.op == ("B" if back else "F")
        )
        return {
            part: at
            for done, at in passes
            for part in graph.parts(edge, stage, done.microbatch, self.microbatches)
        }

    def _send(
        self,
        seat: int,
        blocks: Mapping[int, int],
        users: Mapping[int, Mapping[int, int]],
        way: tuple[Edge, bool],
    ) -> None:
        edge, back = way
        source = edge.target if back else edge.source
        each, own = self.made[seat], users.get(seat, {})
        for part, index in blocks.items():
            post = _post(edge, part, back)
            each.put(index + 1, "send", post)
            if seat not in users:
                uses = {other: found[part] for other, found in users.items() if part in found}
                gap = self.sent(seat, source, self.graph.part(edge, source, part), uses)
                order = "sent" if gap < len(each.blocks) else "over"
                each.put(gap, order, post._replace(op="WAIT"))
            elif part not in own:
                each.put(len(each.blocks), "over", post._replace(op="WAIT"))

    def _receive(
        self,
        seat: int,
        parts: Sequence[int],
        users: Mapping[int, Mapping[int, int]],
        way: tuple[Edge, bool],
    ) -> None:
        """Launches of a seat that only receives, late but in order."""
        edge, back = way
        each, uses, target = self.made[seat], users[seat], edge.source if back else edge.target
        gap, launches = len(each.blocks), list[tuple[int, int]]()
        for part in reversed(parts):
            forward = Action("F", target, self.graph.part(edge, target, part))
            after = each.index.get(forward, -1) + 1 if back else 0
            gap = min(gap, max(after, uses[part] - self.lookahead, 0), self._before(seat, part, users))
            launches.append((gap, part))
        for gap, part in reversed(launches):
            each.put(gap, "receive", _post(edge, part, back))

    def _before(self, seat: int, part: int, users: Mapping[int, Mapping[int, int]]) -> int:
        """Blocks of a seat that are over before the first use of a transfer anywhere begins."""
        first = [
            self.spots[other][found[part]][0]
            for other, found in users.items()
            if part in found and found[part] < len(self.spots[other])
        ]
        if not first:
            return len(self.made[seat].blocks)
        return bisect_right(self.spots[seat], min(first), key=lambda spot: spot[1])


def _post(edge: Edge, part: int, back: bool) -> Action:
    return Action("POST", edge.source, part, edge.target, back)


def _gathers(graph: Graph, made: Sequence[Blocks], lookahead: int) -> None:
    """GATHER before and FREE after each run of uses of a stage; whole over a pause that is too short.

    Seats of a joined stage pause together, and gather right before the use that they have together.
    """
    turns = [[index for index, block in enumerate(each.blocks) if block[0].op != "W"] for each in made]
    for stage, seats in graph.home.items():
        for group in [seats] if stage in graph.joined else [(seat,) for seat in seats]:
            ahead = lookahead if len(group) == 1 else 0
            own = {
                seat: [(i, at) for i, at in enumerate(turns[seat]) if made[seat].blocks[at][0].unit == stage]
                for seat in group
            }
            pauses = zip(*(pairwise(uses) for uses in own.values()), strict=False)
            long = [all(j > i + 1 and use - ahead > at + 1 for (i, at), (j, use) in each) for each in pauses]
            for seat, uses in own.items():
                _whole(made[seat], stage, [at for _, at in uses], long, ahead)


def _whole(each: Blocks, stage: str, uses: Sequence[int], long: Sequence[bool], ahead: int) -> None:
    """GATHER and FREE around the uses of a stage; ``long``: of each pause, whether it is worth it."""
    if not uses:
        return
    each.put(max(0, uses[0] - ahead), "GATHER", Action("GATHER", stage))
    for (before, after), worth in zip(pairwise(uses), long, strict=False):
        if worth:
            each.put(before + 1, "FREE", Action("FREE", stage))
            each.put(after - ahead, "GATHER", Action("GATHER", stage))
    each.put(uses[-1] + 1, "FREE", Action("FREE", stage))


def _reductions(graph: Graph, made: Sequence[Blocks], *, every: bool) -> None:
    """REDUCE after every W, or after the last one of each stage.

    Of a stage that runs by itself on several seats they come at the end, where these are in one order.
    """
    for stage, seats in graph.home.items():
        alone = len(seats) > 1 and stage not in graph.joined
        for seat in seats:
            each, last = made[seat], dict[int, int]()
            for done, index in each.index.items():
                if done[:2] == ("W", stage):
                    last[done.microbatch if every and not alone else -1] = index
            for index in last.values():
                gap, order = (len(each.blocks), "sum") if alone else (index + 1, "REDUCE")
                each.put(gap, order, Action("REDUCE", stage))


def _least(each: Blocks, frozen: Container[str]) -> int:
    """Microbatches that are on the device at once whatever goes out: those between B and W cannot."""
    least = waiting = 0
    for block in each.blocks:
        least = max(least, waiting + (block[0].op != "W" and block[0].unit not in frozen))
        waiting += (block[-1].op == "B") - (block[0].op == "W")
    return least


def _offload(each: Blocks, resident: int, rank: int, frozen: Container[str]) -> None:
    """OUT right after F and IN before B, for as few microbatches as the bound needs.

    Where a computation finds no room, what is needed last goes out (nothing else needs fewer).
    """
    if resident < (least := _least(each, frozen)):
        raise ValueError(
            f"rank {rank} needs {least} microbatches on the device at once, as none goes out "
            f"between B and W, but only {resident} may stay there; set the bound to at least {least}"
        )
    end = len(each.blocks)
    spans = {
        done: [each.index.get(Action(op, *done[1:]), end) for op in COMPUTE]
        for done in each.index
        if done.op == "F" and done.unit not in frozen
    }
    out, live = set[Action](), set[Action]()
    for index, block in enumerate(each.blocks):
        here = block[0]._replace(op="F")
        live |= spans.keys() & {here}
        movable = sorted(live - {here}, key=lambda other: spans[other][1])
        while len(live) > resident and movable and spans[movable[-1]][1] > index:
            out.add(movable[-1])
            live.remove(movable.pop())
        live -= {here} if block[-1].op == "W" else set()
    room = [resident] * (end + 1)
    for done, (first, second, last) in spans.items():
        for index in (first, *range(second, last + 1)) if done in out else range(first, last + 1):
            room[index] -= 1
    for done in sorted(out, key=lambda other: spans[other][1]):
        first, second, _ = spans[done]
        if all(free > 0 for free in room[first + 1 : second]):
            room[first + 1 : second] = [free - 1 for free in room[first + 1 : second]]
            continue
        early = second - 1 if room[second - 1] > 0 else second
        room[early] -= early < second
        each.put(first + 1, "OUT", done._replace(op="OUT"))
        each.put(early, "IN", done._replace(op="IN"))
