"""What the list of one seat must have and in which order: the rules of ``prove`` for one list.

What must be there comes as chains: runs of actions, each of which needs the one before it. ``F(1,3)`` of a
stage that reads from another rank stands in ``POST(0>1,3) WAIT(0>1,3) F(1,3)`` and in ``F(1,3) B(1,3)
W(1,3)``. A list must have the actions of all its chains, once and in their order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Schedule

Rule = Literal[
    "graph", "unknown", "missing", "twice", "order", "store", "channel", "meeting", "deadlock", "memory"
]
SHOWN = 8  # of a long list of faults or names, those in a message
_STORE = ("GATHER", "FREE", "REDUCE")
_FOREIGN = "is not an action of a list"
_WHY: Mapping[tuple[str, str], str] = {
    ("F", "B"): "which reads what it keeps",
    ("B", "W"): "which reads the gradients that it leaves",
    ("F", "OUT"): "which takes away what it keeps",
    ("OUT", "IN"): "which brings that back",
    ("IN", "B"): "which reads what it brings back",
    ("POST", "WAIT"): "which waits for it",
    ("WAIT", "F"): "which reads what it receives",
    ("WAIT", "B"): "which reads what it receives",
    ("F", "POST"): "which sends its result",
    ("B", "POST"): "which sends its result",
    ("F", "F"): "which reads its result",
    ("B", "B"): "which reads its result",
}


class Fault(NamedTuple):
    """What is wrong.

    Attributes:
        rule: which.
        rank: seat of the list; -1 for the graph.
        at: place in the list, from 0; -1 for what is not there.
        message: names the rank, the action, what is missing or in conflict, and the fix where there is one.
    """

    rule: Rule
    rank: int
    at: int
    message: str


@dataclass(frozen=True)
class Listed:
    """Actions of a seat, the first place of each, and all its places."""

    rank: int
    actions: tuple[Action, ...]
    place: Mapping[Action, int]
    places: Mapping[Action, list[int]]

    @classmethod
    def of(cls, rank: int, actions: tuple[Action, ...]) -> "Listed":
        """From its list."""
        places: dict[Action, list[int]] = {}
        for at, made in enumerate(actions):
            places.setdefault(made, []).append(at)
        return cls(rank, actions, {made: found[0] for made, found in places.items()}, places)

    def fault(self, rule: Rule, at: int, message: str) -> Fault:
        """One at a place of this list."""
        return Fault(rule, self.rank, at, f"rank {self.rank}: {message}")

    def show(self, at: int) -> str:
        """The action there, and where."""
        return f"{self.actions[at]} (at {at})"


def program(schedule: Schedule, lists: Sequence[Listed], rank: int, training: bool) -> Iterator[Fault]:
    """What is missing in the list of a rank, what should not be there, what stands too late."""
    listed = lists[rank]
    graph = schedule.graph
    known = {Action(op, stage) for op in _STORE for stage in graph.at(rank)}
    known -= {Action("REDUCE", stage) for stage in graph.frozen}
    missing: dict[Action, list[tuple[int, int]]] = {}  # to the places around it, of each of its chains
    late: dict[Action, Action] = {}  # to the first that should come after it
    for chain in _chains(schedule, listed) if training else _forward(schedule, listed):
        known.update(chain)
        there = [made for made in chain if made in listed.place]
        if len(there) < len(chain):
            for made, before, after in _gaps(chain, listed.place):
                missing.setdefault(made, []).append((before, after))
        for first, then in pairwise(there):
            at = listed.place[then]
            if listed.place[first] > at and (first not in late or at < listed.place[late[first]]):
                late[first] = then
    for made, around in missing.items():
        yield listed.fault("missing", -1, _absent(graph, lists, listed, made, around))
    for first, then in late.items():
        yield _late(listed, first, then)
    yield from _strangers(schedule, listed, known | {Action("STEP")} if training else known)
    yield from _store(listed)
    if training:
        yield from _step(listed)


def _chains(schedule: Schedule, listed: Listed) -> Iterator[tuple[Action, ...]]:
    """What must be in a list, as runs of actions in the order in which they must stand."""
    graph = schedule.graph
    for stage in graph.at(listed.rank):
        edges = [edge for edge in graph.edges if stage in edge]
        for i in range(graph.passes(stage, schedule.microbatches)):
            forward, backward = Action("F", stage, i), Action("B", stage, i)
            yield (forward,) if stage in graph.frozen else (forward, backward, Action("W", stage, i))
            if i:
                yield Action("F", stage, i - 1), forward
            out, into = Action("OUT", stage, i), Action("IN", stage, i)
            if stage not in graph.frozen and (out in listed.place or into in listed.place):
                yield forward, out, into, backward
            for edge in edges:
                for part in graph.parts(edge, stage, i, schedule.microbatches):
                    yield from _over(graph, edge, part, stage, (forward, backward))


def _over(
    graph: Graph, edge: Edge, part: int, stage: str, passes: tuple[Action, Action]
) -> Iterator[tuple[Action, ...]]:
    """What a transfer asks of the passes of the stage at one of its ends."""
    forward, backward = passes
    reads = stage == edge.target
    if not graph.crosses(edge):
        other = graph.part(edge, edge.source, part)
        if reads:
            yield Action("F", edge.source, other), forward
        if reads and graph.returns(edge):
            yield backward, Action("B", edge.source, other)
        return
    there, back = ((edge.source, part, edge.target, way) for way in (False, True))
    sent, returned = ((Action("POST", *way), Action("WAIT", *way)) for way in (there, back))
    yield (*sent, forward) if reads else (forward, *sent)
    if graph.returns(edge):
        yield (backward, *returned) if reads else (*returned, backward)


def _forward(schedule: Schedule, listed: Listed) -> Iterator[tuple[Action, ...]]:
    """The parts of the chains that there are without gradients."""
    for chain in _chains(schedule, listed):
        yield tuple(made for made in chain if made.op == "F" or (made.target and not made.back))


def _gaps(chain: Sequence[Action], place: Mapping[Action, int]) -> Iterator[tuple[Action, int, int]]:
    """What a chain lacks, with the places in the list of what comes before and after it, or -1."""
    for i, made in enumerate(chain):
        if made not in place:
            before = max((place[other] for other in chain[:i] if other in place), default=-1)
            yield made, before, min((place[other] for other in chain[i:] if other in place), default=-1)


def _absent(
    graph: Graph, lists: Sequence[Listed], listed: Listed, missing: Action, around: Iterable[tuple[int, int]]
) -> str:
    """What leaks or starves without an action, and where it belongs."""
    before = max((before for before, _ in around), default=-1)
    after = min((after for _, after in around if after >= 0), default=-1)
    words, where = [f"{missing} is missing"], list[str]()
    if before >= 0:
        where.append(f"after {listed.show(before)}")
    if after >= 0:
        where.append(f"before {listed.show(after)}")
        words.append(f"{listed.show(after)} starves")
    elif before >= 0:
        words.append(f"what {listed.show(before)} makes leaks")
    for other in graph.party(missing.edge) if missing.op == "POST" else ():
        wait = lists[other].place.get(missing._replace(op="WAIT"))
        if wait is not None and other != listed.rank:
            words.append(f"{lists[other].show(wait)} of rank {other} never ends")
    return "; ".join(words) + (f": put it {' and '.join(where)}" if where else "")


def _late(listed: Listed, first: Action, then: Action) -> Fault:
    at, before = listed.place[first], listed.place[then]
    ascending = first.op == then.op == "F" and first.unit == then.unit
    why = "as forward passes of a stage ascend" if ascending else _WHY[first.op, then.op]
    message = f"{first} (at {at}) must come before {then} (at {before}), {why}: move one past the other"
    return listed.fault("order", at, message)


def _strangers(schedule: Schedule, listed: Listed, known: Set[Action]) -> Iterator[Fault]:
    """What should not be there, or not again."""
    for at, made in enumerate(listed.actions):
        first = listed.place[made]
        if made not in known:
            why = (_stray if made.target else _misplaced)(schedule.graph, listed.rank, made)
            if (count := _count(schedule, made)) <= made.microbatch:
                what = "microbatch" if count == schedule.microbatches else "group of microbatches"
                why = f"is about a {what} that does not exist; there are {count}, from 0"
            yield listed.fault("unknown", at, f"{listed.show(at)} {why}")
        elif first != at and made.op not in _STORE:
            yield listed.fault("twice", at, f"{listed.show(at)} is already there at {first}: remove one")


def _count(schedule: Schedule, made: Action) -> int:
    """Passes of a stage, or transfers of an edge."""
    graph = schedule.graph
    if made.edge in graph.edges:
        return graph.transfers(made.edge, schedule.microbatches)
    return graph.passes(made.unit, schedule.microbatches)


def _stray(graph: Graph, rank: int, made: Action) -> str:
    """What is wrong with a POST or WAIT."""
    if made.edge not in graph.edges:
        edges = _some(f"{source}>{target}" for source, target in graph.edges)
        return f"is about an edge that does not exist; there are {edges}"
    if not graph.crosses(made.edge):
        return (
            f"is not needed: both stages are on {_ranks(graph.home[made.unit])}, which hands over; remove it"
        )
    party = graph.party(made.edge)
    if rank not in party:
        return f"belongs in the lists of {_ranks(party)}"
    return f"is of gradients of {made.unit}, which is frozen: remove it" if made.back else _FOREIGN


def _misplaced(graph: Graph, rank: int, made: Action) -> str:
    """What is wrong with another action."""
    if made.unit and made.unit not in graph.home:
        return f"is about a stage that does not exist; there are {_some(graph.home)}"
    home = graph.home.get(made.unit, (rank,))
    if rank not in home:
        return f"belongs in the list of {_ranks(home)}"
    return "is of a frozen stage, which has only F: remove it" if made.unit in graph.frozen else _FOREIGN


def _ranks(seats: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0 and 1``."""
    return f"rank{'s' * (len(seats) > 1)} {' and '.join(map(str, seats))}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join([*listed[:SHOWN], *(["..."] if len(listed) > SHOWN else [])]) or "none"


def _store(listed: Listed) -> Iterator[Fault]:
    """Whether parameters are whole where F and B read them, and all gradients are summed."""
    steps: dict[str, list[tuple[int, str]]] = {}
    for at, made in enumerate(listed.actions):
        if made.op in COMPUTE or made.op in _STORE:
            steps.setdefault(made.unit, []).append((at, made.op))
    for unit, mine in steps.items():
        if any(op in ("GATHER", "FREE") for _, op in mine):
            yield from _whole(listed, unit, mine)
        yield from _summed(listed, unit, mine)


def _step(listed: Listed) -> Iterator[Fault]:
    """STEP at the end."""
    last = len(listed.actions) - 1
    step = listed.place.get(Action("STEP"))
    if step is None:
        yield listed.fault("missing", -1, "STEP is missing: put it at the end")
    elif step < last:
        words = f"STEP (at {step}) must be last, but {listed.show(step + 1)} follows: move it to the end"
        yield listed.fault("order", step, words)


def _whole(listed: Listed, unit: str, steps: Iterable[tuple[int, str]]) -> Iterator[Fault]:
    """GATHER, what reads, FREE, in turns."""
    gather, read = -1, False
    for at, op in steps:
        words = ""
        if op in ("F", "B"):
            read = True
            words = f"finds no parameters: put GATHER({unit}) before it" if gather < 0 else ""
        elif op == "GATHER":
            again = f"comes after {listed.show(gather)} with no FREE({unit}) between: put one in"
            words = again if gather >= 0 else ""
            gather, read = at, False
        elif op == "FREE":
            if gather < 0:
                words = f"frees what is not whole: remove it, or put GATHER({unit}) before it"
            elif not read:
                words = f"comes before any F or B read what {listed.show(gather)} made whole: remove both"
            gather = -1
        if words:
            yield listed.fault("store", at, f"{listed.show(at)} {words}")
    if gather >= 0:
        yield listed.fault("store", gather, f"{listed.show(gather)} leaks: put FREE({unit}) after it")


def _summed(listed: Listed, unit: str, steps: Iterable[tuple[int, str]]) -> Iterator[Fault]:
    """REDUCE after the last W, and only where there is something to sum."""
    fresh = -1  # the last W that is not summed
    for at, op in steps:
        if op == "W":
            fresh = at
        elif op == "REDUCE":
            if fresh < 0:
                words = f"{listed.show(at)} has nothing to sum: remove it, or put it after a W"
                yield listed.fault("store", at, words)
            fresh = -1
    if fresh >= 0:
        yield listed.fault("store", fresh, f"{listed.show(fresh)} leaks: put REDUCE({unit}) after it")
