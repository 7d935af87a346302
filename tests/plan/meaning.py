"""What a schedule means: a slow twin of the executor whose values are terms.

A term is a number: equal terms have equal numbers. Every seat of a stage has terms of its own; what a seat
receives over an edge is made of those of all seats of the other end.
"""

from collections import Counter
from typing import Any

from weft.plan.schedule import Action, Edge, Graph, Schedule

_NUMBERS: dict[tuple[Any, ...], int] = {}


def term(*parts: Any) -> int:
    """The number of a term."""
    return _NUMBERS.setdefault(parts, len(_NUMBERS))


class Wrong(Exception):
    """A list that hangs, or uses what is not there, or leaves something behind."""


def oracle(graph: Graph, microbatches: int) -> dict[str, Counter[int]]:
    """Of each stage, the weight gradients of all passes of all seats, without any order."""
    known: dict[tuple[Any, ...], int] = {}

    def over(edge: Edge, stage: str, seat: int, i: int, back: bool) -> Any:
        other = edge.target if back else edge.source
        seats = graph.home[other] if graph.crosses(edge) else (seat,)
        for part in graph.parts(edge, stage, i, microbatches):
            passed = graph.part(edge, other, part)
            yield term(*(term(part, run(other, each, passed, back)) for each in seats))

    def run(stage: str, seat: int, i: int, back: bool) -> int:
        key = stage, seat, i, back
        if key not in known:
            edges = [edge for edge in graph.edges if (edge.source if back else edge.target) == stage]
            start = ("B", run(stage, seat, i, False)) if back else ("F", stage, seat, i)
            known[key] = term(*start, *(each for edge in edges for each in over(edge, *key)))
        return known[key]

    return {
        stage: Counter(
            run(stage, seat, i, True) for i in range(graph.passes(stage, microbatches)) for seat in seats
        )
        for stage, seats in graph.home.items()
        if stage not in graph.frozen
    }


def outcome(schedule: Schedule) -> dict[str, Counter[int]]:
    """Of each stage, the weight gradients that are summed when STEP happens.

    In turn every seat does one action if it can. The transfers of a channel have no names: the first that
    a receiver launches takes the first that the senders launch.

    Raises:
        Wrong: a seat uses what it does not have, all seats wait, or something is left.
    """
    machine = _Machine(schedule)
    at = [0] * len(schedule.lists)
    while any(place < len(actions) for place, actions in zip(at, schedule.lists, strict=True)):
        before = list(at)
        for rank, actions in enumerate(schedule.lists):
            if at[rank] < len(actions) and machine.meets(rank, at[rank]):
                made = actions[at[rank]]
                at[rank] += getattr(machine, made.op)(rank, made) is not False
        if at == before:
            raise Wrong(f"all wait, at {at}")
    if left := {name: value for name, value in vars(machine).items() if value and name[0] != "_"}:
        raise Wrong(f"left: {left}")
    return machine._stepped


class _Machine:
    """Everything that seats hold. A method says False if it has to wait."""

    def __init__(self, schedule: Schedule) -> None:
        self._graph, self._microbatches = schedule.graph, schedule.microbatches
        self._gathers = {made.unit for actions in schedule.lists for made in actions if made.op == "GATHER"}
        self._lists = schedule.lists
        self._launched: dict[tuple[Edge, bool, int], list[int]] = {}  # of a channel on a seat: transfers
        self._met: dict[tuple[Action, int], set[int]] = {}
        self._summed: dict[str, Counter[int]] = {}
        self._stepping: set[int] = set()
        self._stepped: dict[str, Counter[int]] = {}
        self.values: dict[tuple[Any, ...], int] = {}
        self.open: set[tuple[int, Action]] = set()
        self.whole: set[tuple[int, str]] = set()
        self.fresh: dict[tuple[int, str], Counter[int]] = {}

    def meets(self, rank: int, at: int) -> bool:
        """Whether all seats have come to what they do together."""
        made = self._lists[rank][at]
        seats = self._graph.meeting(made) if made.op != "STEP" else ()
        came = self._met.setdefault((made, self._lists[rank][:at].count(made)), set()) if seats else set()
        came.add(rank)
        return rank not in seats or len(came) == len(seats)

    def take(self, *key: Any) -> int:
        if key not in self.values:
            raise Wrong(f"there is no {key}")
        return self.values.pop(key)

    def give(self, value: int, *key: Any) -> None:
        if key in self.values:
            raise Wrong(f"there is already {key}")
        self.values[key] = value

    def parts(self, edge: Edge, made: Action) -> range:
        return self._graph.parts(edge, made.unit, made.microbatch, self._microbatches)

    def compute(self, rank: int, made: Action, start: tuple[Any, ...], *, back: bool) -> int:
        """Reads what came over edges, and hands the result to all that read it."""
        graph = self._graph
        whole = (rank, made.unit) in self.whole or made.unit not in self._gathers
        if rank not in graph.home[made.unit] or not whole or (back and made.unit in graph.frozen):
            raise Wrong(f"{made} on rank {rank}, where it cannot be")
        ends = [(edge, (edge.target, edge.source) if back else edge) for edge in graph.edges]
        reads = [edge for edge, (_, target) in ends if target == made.unit]
        came = (self.take("in", rank, e, back, part) for e in reads for part in self.parts(e, made))
        value = term(*start, *came)
        for edge, (source, _) in ends:
            for part in self.parts(edge, made) if source == made.unit else ():
                if graph.crosses(edge) and (not back or graph.returns(edge)):
                    self.give(term(part, value), "out", rank, edge, back, part)
                elif not back or graph.returns(edge):
                    self.give(term(term(part, value)), "in", rank, edge, back, part)
        return value

    def F(self, rank: int, made: Action) -> None:
        value = self.compute(rank, made, ("F", made.unit, rank, made.microbatch), back=False)
        if made.unit not in self._graph.frozen:
            self.give(value, "kept", rank, *made[1:3])

    def B(self, rank: int, made: Action) -> None:
        kept = self.take("kept", rank, *made[1:3])
        self.give(self.compute(rank, made, ("B", kept), back=True), "weights", rank, *made[1:3])

    def W(self, rank: int, made: Action) -> None:
        gradient = self.take("weights", rank, *made[1:3])
        self.fresh.setdefault((rank, made.unit), Counter())[gradient] += 1

    def OUT(self, rank: int, made: Action) -> None:
        self.give(self.take("kept", rank, *made[1:3]), "host", rank, *made[1:3])

    def IN(self, rank: int, made: Action) -> None:
        self.give(self.take("host", rank, *made[1:3]), "kept", rank, *made[1:3])

    def GATHER(self, rank: int, made: Action) -> None:
        if (rank, made.unit) in self.whole or rank not in self._graph.home[made.unit]:
            raise Wrong(f"{made} of what is whole")
        self.whole.add((rank, made.unit))

    def FREE(self, rank: int, made: Action) -> None:
        if (rank, made.unit) not in self.whole:
            raise Wrong(f"{made} of what is not whole")
        self.whole.remove((rank, made.unit))

    def REDUCE(self, rank: int, made: Action) -> None:
        if rank not in self._graph.home[made.unit]:
            raise Wrong(f"{made} on rank {rank}")
        self._summed.setdefault(made.unit, Counter()).update(self.fresh.pop((rank, made.unit), {}))

    def ends(self, made: Action) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Seats that send and receive."""
        if made.edge not in self._graph.edges:
            raise Wrong(f"{made}: no such edge")
        source, target = (self._graph.home[end] for end in made.edge)
        return (target, source) if made.back else (source, target)

    def POST(self, rank: int, made: Action) -> None:
        senders, receivers = self.ends(made)
        if rank not in (*senders, *receivers):
            raise Wrong(f"{made} on rank {rank}")
        launched = self._launched.setdefault((made.edge, made.back, rank), [])
        if rank in senders:
            value = self.take("out", rank, made.edge, made.back, made.microbatch)
            for receiver in receivers:
                self.give(value, "wire", made.edge, made.back, len(launched), rank, receiver)
        launched.append(made.microbatch)
        self.open.add((rank, made))

    def WAIT(self, rank: int, made: Action) -> bool:
        if (rank, made._replace(op="POST")) not in self.open:
            raise Wrong(f"{made} on rank {rank} without a POST")
        senders, receivers = self.ends(made)
        mine = self._launched[made.edge, made.back, rank]
        place = len(mine) - 1 - mine[::-1].index(made.microbatch)
        counts = [
            len(self._launched.get((made.edge, made.back, seat), [])) for seat in (*senders, *receivers)
        ]
        if place >= min(counts):
            return False
        self.open.remove((rank, made._replace(op="POST")))
        if rank in receivers:
            came = (self.take("wire", made.edge, made.back, place, sender, rank) for sender in senders)
            self.give(term(*came), "in", rank, made.edge, made.back, made.microbatch)
        return True

    def STEP(self, rank: int, _: Action) -> bool:
        self._stepping.add(rank)
        if len(self._stepping) < len(self._lists):
            return False
        self._stepped = self._stepped or {unit: Counter(terms) for unit, terms in self._summed.items()}
        return True
