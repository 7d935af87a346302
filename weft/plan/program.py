"""What the list of one pipeline rank must have and in which order: the rules of ``prove`` for one list.

What must be there comes as chains: runs of actions, each of which needs the one before it. ``F(1,3)`` of a
stage that reads from another rank stands in ``POST(0>1,3) WAIT(0>1,3) F(1,3)`` and in ``F(1,3) B(1,3)
W(1,3)``. A list must have the actions of all its chains, once and in their order.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Schedule

Rule = Literal["graph", "unknown", "missing", "twice", "order", "store", "channel", "deadlock", "memory"]
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
        rank: pipeline rank of the list; -1 for the graph.
        at: place in the list, from 0; -1 for what is not there.
        message: names the rank, the action, what is missing or in conflict, and the fix where there is one.
    """

    rule: Rule
    rank: int
    at: int
    message: str


@dataclass(frozen=True)
class Listed:
    """Actions of a pipeline rank, and the first place of each."""

    rank: int
    actions: tuple[Action, ...]
    place: Mapping[Action, int]

    @classmethod
    def of(cls, rank: int, actions: tuple[Action, ...]) -> "Listed":
        """From its list."""
        place: dict[Action, int] = {}
        for at, made in enumerate(actions):
            place.setdefault(made, at)
        return cls(rank, actions, place)

    def fault(self, rule: Rule, at: int, message: str) -> Fault:
        """One at a place of this list."""
        return Fault(rule, self.rank, at, f"rank {self.rank}: {message}")

    def show(self, at: int) -> str:
        """The action there, and where."""
        return f"{self.actions[at]} (at {at})"


def peer(graph: Graph, rank: int, edge: Edge) -> int:
    """The rank at the other end of an edge; -1 where this one is at neither end, or at both."""
    ends = (graph.home[edge.source], graph.home[edge.target])
    return ends[ends[0] == rank] if rank in ends and graph.crosses(edge) else -1


def program(schedule: Schedule, lists: Sequence[Listed], rank: int, training: bool) -> Iterator[Fault]:
    """What is missing in the list of a rank, what should not be there, what stands too late."""
    listed = lists[rank]
    known = {Action(op, stage) for op in _STORE for stage in schedule.graph.at(rank)}
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
        yield listed.fault("missing", -1, _absent(schedule.graph, lists, listed, made, around))
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
        inside = [edge for edge in graph.edges if edge.target == stage and not graph.crosses(edge)]
        reads = [edge for edge in graph.edges if edge.target == stage and graph.crosses(edge)]
        gives = [edge for edge in graph.edges if edge.source == stage and graph.crosses(edge)]
        for i in range(schedule.microbatches):
            forward, backward = Action("F", stage, i), Action("B", stage, i)
            yield forward, backward, Action("W", stage, i)
            if i:
                yield Action("F", stage, i - 1), forward
            out, into = Action("OUT", stage, i), Action("IN", stage, i)
            if out in listed.place or into in listed.place:
                yield forward, out, into, backward
            for source, _ in inside:
                yield Action("F", source, i), forward
                yield backward, Action("B", source, i)
            for source, target in reads:
                there, back = (source, i, target, False), (source, i, target, True)
                yield Action("POST", *there), Action("WAIT", *there), forward
                yield backward, Action("POST", *back), Action("WAIT", *back)
            for source, target in gives:
                there, back = (source, i, target, False), (source, i, target, True)
                yield forward, Action("POST", *there), Action("WAIT", *there)
                yield Action("POST", *back), Action("WAIT", *back), backward


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
    other = peer(graph, listed.rank, missing.edge) if missing.op == "POST" else -1
    wait = lists[other].place.get(missing._replace(op="WAIT")) if other >= 0 else None
    if wait is not None:
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
            if made.microbatch >= schedule.microbatches:
                why = f"is about a microbatch that does not exist; there are {schedule.microbatches}, from 0"
            yield listed.fault("unknown", at, f"{listed.show(at)} {why}")
        elif first != at and made.op not in _STORE:
            yield listed.fault("twice", at, f"{listed.show(at)} is already there at {first}: remove one")


def _stray(graph: Graph, rank: int, made: Action) -> str:
    """What is wrong with a POST or WAIT."""
    if made.edge not in graph.edges:
        edges = _some(f"{source}>{target}" for source, target in graph.edges)
        return f"is about an edge that does not exist; there are {edges}"
    ends = (graph.home[made.unit], graph.home[made.target])
    if ends[0] == ends[1]:
        return f"is not needed: both stages are on rank {ends[0]}, which hands over; remove it"
    return f"belongs in the lists of ranks {ends[0]} and {ends[1]}" if rank not in ends else _FOREIGN


def _misplaced(graph: Graph, rank: int, made: Action) -> str:
    """What is wrong with another action."""
    if made.unit and made.unit not in graph.home:
        return f"is about a stage that does not exist; there are {_some(graph.home)}"
    home = graph.home.get(made.unit, rank)
    return f"belongs in the list of rank {home}" if home != rank else _FOREIGN


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
