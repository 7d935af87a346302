"""Puts into lists of F, B and W what they need: transfers, gathers, reductions, offload.

Between two computations everything stands in this order (``_ORDER``): first what follows from the earlier
one, launches before waits; then launches for a later one; last the waits of the next one.

- A result is sent right after it is made. The sender waits for a transfer only where it can know that it is
  over: after a computation that needs, by way of other ranks, what the receiver made of it. So senders never
  block, and a list is free of deadlock as soon as its F, B and W are.
- The receiver launches ``lookahead`` computations early and waits right before the use. Launches of a channel
  have the order of the sender, which is earlier where the uses have another order.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import pairwise

from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Lists, Schedule

_ORDER = ("send", "sent", "OUT", "FREE", "REDUCE", "receive", "GATHER", "IN", "received", "STEP")


class _List:
    """A rank's computations in blocks between which other actions are put; a B with its W is one block.

    Attributes:
        blocks: an F, B or W, or a B and its W.
        index: block of each computation.
    """

    def __init__(self, actions: Iterable[Action], apart: Container[str] = ()) -> None:
        """``apart``: stages whose B is a block of its own."""
        self.blocks: list[tuple[Action, ...]] = []
        for done in actions:
            whole = done._replace(op="B") if done.op == "W" and done.unit not in apart else None
            if self.blocks and self.blocks[-1] == (whole,):
                self.blocks[-1] = (*self.blocks[-1], done)
            else:
                self.blocks.append((done,))
        self.index = {done: index for index, block in enumerate(self.blocks) for done in block}
        self._between: list[list[tuple[int, Action]]] = [[] for _ in range(len(self.blocks) + 1)]

    def put(self, gap: int, order: str, done: Action) -> None:
        """Before the block of this index, or after all; in the order of calls among its like."""
        self._between[gap].append((_ORDER.index(order), done))

    def merged(self) -> Iterator[Action]:
        """Everything, in order."""
        for index, others in enumerate(self._between):
            yield from (done for _, done in sorted(others, key=lambda entry: entry[0]))
            yield from self.blocks[index] if index < len(self.blocks) else ()


def complete(
    graph: Graph,
    lists: Lists,
    *,
    level: int = 0,
    gather: str = "unit",
    resident: int = 0,
    lookahead: int = 1,
    split: bool = False,
) -> Schedule:
    """A schedule from what each rank computes. Lists that hold anything but F, B and W are taken as they are.

    Args:
        graph: the stages.
        lists: of each pipeline rank.
        level: of the store.
        gather: "stage" if at level 3 parameters are made whole for a run of uses of a stage.
        resident: most microbatches of its stages that a rank keeps on the device; 0 if there is no bound.
        lookahead: computations before its use that a receive or gather is launched.
        split: send the gradient between B and a W that follows it; else the two are one pass.

    Raises:
        ValueError: fewer residents than the lists can do with.
    """
    microbatches = 1 + max((done.microbatch for actions in lists for done in actions), default=0)
    if any(done.op not in COMPUTE for actions in lists for done in actions):
        return Schedule(graph, microbatches, lists)
    sends = {edge.target for edge in graph.edges if graph.crosses(edge)} if split else set[str]()
    made = [_List(actions, sends) for actions in lists]
    clocks = _clocks(graph, made)

    def sent(sender: int, receiver: int, use: int, _: int) -> int:
        found = bisect_right(clocks[sender], use, key=lambda clock: clock[receiver])
        return found + 1 if found < len(clocks[sender]) else len(made[sender].blocks)

    for edge in filter(graph.crosses, graph.edges):
        _transfer(graph, made, edge, back=False, lookahead=lookahead, sent=sent)
        _transfer(graph, made, edge, back=True, lookahead=lookahead, sent=sent)
    for rank, each in enumerate(made):
        if gather == "stage" and level == 3:
            _gathers(each, lookahead)
        _reductions(each, every=gather == "stage" and level >= 2)
        if resident:
            _offload(each, resident, rank)
        each.put(len(each.blocks), "STEP", Action("STEP"))
    return Schedule(graph, microbatches, tuple(tuple(each.merged()) for each in made))


def forward_only(
    graph: Graph, microbatches: int, *, level: int = 0, gather: str = "unit", lookahead: int = 1
) -> Schedule:
    """A schedule without B, W, REDUCE and STEP, for evaluation; no stage may need one that comes later.

    A rank takes its stages in turn, a round of as many microbatches as there are ranks each. A sender waits
    for the transfers of a round two rounds later, so that it holds few of them; what the receiver does until
    then needs nothing that the sender does after.
    """
    ranks = graph.ranks
    rounds = [range(start, min(start + ranks, microbatches)) for start in range(0, microbatches, ranks)]
    orders = [
        [(stage, i) for each in rounds for stage in graph.at(rank) for i in each] for rank in range(ranks)
    ]
    made = [_List(Action("F", *which) for which in order) for order in orders]

    def sent(sender: int, _: int, __: int, microbatch: int) -> int:
        later = microbatch // ranks + 2
        return bisect_left(made[sender].blocks, later, key=lambda block: block[0].microbatch // ranks)

    for edge in filter(graph.crosses, graph.edges):
        _transfer(graph, made, edge, back=False, lookahead=lookahead, sent=sent)
    for each in made:
        if gather == "stage" and level == 3:
            _gathers(each, lookahead)
    return Schedule(graph, microbatches, tuple(tuple(each.merged()) for each in made))


def _clocks(graph: Graph, made: Sequence[_List]) -> list[list[list[int]]]:
    """For each rank and block: how many blocks of each rank are over once this one is (vector clocks).

    A rank's clocks end where the lists run into a deadlock.
    """
    needs: dict[tuple[str, str], list[Action]] = {}
    for source, target in graph.edges:
        needs.setdefault(("F", target), []).append(Action("F", source))
        needs.setdefault(("B", source), []).append(Action("B", target))
    clocks: list[list[list[int]]] = [[] for _ in made]

    def clock(rank: int) -> list[int] | None:
        here = clocks[rank]
        now = list(here[-1]) if here else [0] * len(made)
        for done in made[rank].blocks[len(here)]:
            for need in needs.get((done.op, done.unit), ()):
                other = graph.home[need.unit]
                index = made[other].index.get(need._replace(microbatch=done.microbatch), -1)
                if index >= len(clocks[other]):
                    return None
                now = [*map(max, now, clocks[other][index])] if index >= 0 else now
        now[rank] = len(here) + 1
        return now

    going = True
    while going:
        going = False
        for rank, each in enumerate(made):
            while len(clocks[rank]) < len(each.blocks) and (now := clock(rank)) is not None:
                clocks[rank].append(now)
                going = True
    return clocks


def _transfer(
    graph: Graph,
    made: Sequence[_List],
    edge: Edge,
    *,
    back: bool,
    lookahead: int,
    sent: Callable[[int, int, int, int], int],
) -> None:
    """POST and WAIT of both ends of an edge in one direction.

    ``sent`` gives the gap of the sender's WAIT from the ranks of sender and receiver, the block that uses
    what was sent, and the microbatch.
    """
    op = "B" if back else "F"
    source, target = (edge.target, edge.source) if back else edge
    sender, receiver = graph.home[source], graph.home[target]

    def blocks(rank: int, unit: str) -> dict[int, int]:
        found = made[rank].index.items()
        return {done.microbatch: index for done, index in found if (done.op, done.unit) == (op, unit)}

    results, uses = blocks(sender, source), blocks(receiver, target)

    def post(microbatch: int) -> Action:
        return Action("POST", edge.source, microbatch, edge.target, back)

    for microbatch, index in results.items():
        made[sender].put(index + 1, "send", post(microbatch))
        use = uses.get(microbatch, len(made[receiver].blocks))
        gap = sent(sender, receiver, use, microbatch)
        made[sender].put(gap, "sent", post(microbatch)._replace(op="WAIT"))
    gap, launches = len(made[receiver].blocks), list[tuple[int, int]]()
    for microbatch in reversed([*(i for i in results if i in uses), *(i for i in uses if i not in results)]):
        forward = made[receiver].index.get(Action("F", target, microbatch), -1) if back else -1
        gap = min(gap, max(forward + 1, uses[microbatch] - lookahead, 0))
        launches.append((gap, microbatch))
    for gap, microbatch in reversed(launches):
        made[receiver].put(gap, "receive", post(microbatch))
        made[receiver].put(uses[microbatch], "received", post(microbatch)._replace(op="WAIT"))


def _gathers(each: _List, lookahead: int) -> None:
    """GATHER before and FREE after each run of uses of a stage; whole over a pause that is too short."""
    uses = [index for index, block in enumerate(each.blocks) if block[0].op != "W"]
    turns: dict[str, list[tuple[int, int]]] = {}
    for turn, index in enumerate(uses):
        turns.setdefault(each.blocks[index][0].unit, []).append((turn, index))
    for stage, own in turns.items():
        each.put(max(0, own[0][1] - lookahead), "GATHER", Action("GATHER", stage))
        for (turn, index), (later, use) in pairwise(own):
            if later > turn + 1 and use - lookahead > index + 1:
                each.put(index + 1, "FREE", Action("FREE", stage))
                each.put(use - lookahead, "GATHER", Action("GATHER", stage))
        each.put(own[-1][1] + 1, "FREE", Action("FREE", stage))


def _reductions(each: _List, *, every: bool) -> None:
    """REDUCE after every W, or after the last one of each stage."""
    last: dict[tuple[str, int], int] = {}
    for done, index in each.index.items():
        if done.op == "W":
            last[done.unit, done.microbatch if every else -1] = index
    for (stage, _), index in last.items():
        each.put(index + 1, "REDUCE", Action("REDUCE", stage))


def _least(each: _List) -> int:
    """Microbatches that are on the device at once whatever goes out: those between B and W cannot."""
    least = waiting = 0
    for block in each.blocks:
        least = max(least, waiting + (block[0].op != "W"))
        waiting += (block[-1].op == "B") - (block[0].op == "W")
    return least


def _offload(each: _List, resident: int, rank: int) -> None:
    """OUT right after F and IN before B, for as few microbatches as the bound needs.

    Where a computation finds no room, what is needed last goes out (nothing else needs fewer).
    """
    if resident < (least := _least(each)):
        raise ValueError(
            f"pipeline rank {rank} needs {least} microbatches on the device at once, as none goes out "
            f"between B and W, but only {resident} may stay there; set the bound to at least {least}"
        )
    end = len(each.blocks)
    spans = {
        done: [each.index.get(Action(op, *done[1:]), end) for op in COMPUTE]
        for done in each.index
        if done.op == "F"
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
