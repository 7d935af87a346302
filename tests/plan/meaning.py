"""What a schedule means: a slow twin of the executor whose values are terms."""

from collections import Counter
from typing import Any

from weft.plan.schedule import Action, Edge, Graph, Schedule

Term = tuple[Any, ...]


class Wrong(Exception):
    """A list that hangs, or uses what is not there, or leaves something behind."""


def oracle(graph: Graph, microbatches: int) -> dict[str, Counter[Term]]:
    """Of each stage, the weight gradients of all microbatches, without any order."""

    def forward(stage: str, i: int) -> Term:
        return ("F", stage, i, *(forward(edge.source, i) for edge in graph.edges if edge.target == stage))

    def backward(stage: str, i: int) -> Term:
        results = (backward(edge.target, i) for edge in graph.edges if edge.source == stage)
        return ("B", forward(stage, i), *results)

    return {stage: Counter(backward(stage, i) for i in range(microbatches)) for stage in graph.home}


def outcome(schedule: Schedule) -> dict[str, Counter[Term]]:
    """Of each stage, the weight gradients that are summed when STEP happens.

    In turn every rank does one action if it can. The transfers of a channel have no names: the first that
    the receiver launches takes the first that the sender launches.

    Raises:
        Wrong: a rank uses what it does not have, all ranks wait, or something is left.
    """
    machine = _Machine(schedule)
    at = [0] * len(schedule.lists)
    while any(place < len(actions) for place, actions in zip(at, schedule.lists, strict=True)):
        before = list(at)
        for rank, actions in enumerate(schedule.lists):
            if at[rank] < len(actions):
                made = actions[at[rank]]
                at[rank] += getattr(machine, made.op)(rank, made) is not False
        if at == before:
            raise Wrong(f"all wait, at {at}")
    if left := {name: value for name, value in vars(machine).items() if value and name[0] != "_"}:
        raise Wrong(f"left: {left}")
    return machine._stepped


class _Machine:
    """Everything that ranks hold. A method says False if it has to wait."""

    def __init__(self, schedule: Schedule) -> None:
        self._graph = schedule.graph
        self._gathers = {made.unit for actions in schedule.lists for made in actions if made.op == "GATHER"}
        self._ranks = len(schedule.lists)
        self._launched: dict[tuple[Edge, bool, int], list[int]] = {}  # of a channel's end: microbatches
        self._summed: dict[str, Counter[Term]] = {}
        self._stepping: set[int] = set()
        self._stepped: dict[str, Counter[Term]] = {}
        self.values: dict[Term, Term] = {}
        self.open: set[tuple[int, Action]] = set()
        self.whole: set[str] = set()
        self.fresh: dict[str, Counter[Term]] = {}

    def take(self, *key: Any) -> Term:
        if key not in self.values:
            raise Wrong(f"there is no {key}")
        return self.values.pop(key)

    def give(self, term: Term, *key: Any) -> None:
        if key in self.values:
            raise Wrong(f"there is already {key}")
        self.values[key] = term

    def compute(self, rank: int, made: Action, start: Term, *, back: bool) -> Term:
        """Reads what came over edges, and hands the result to all that read it."""
        whole = made.unit in self.whole or made.unit not in self._gathers
        if self._graph.home[made.unit] != rank or not whole:
            raise Wrong(f"{made} on rank {rank} without parameters")
        ends = [(edge, (edge.target, edge.source) if back else edge) for edge in self._graph.edges]
        reads = [edge for edge, (_, target) in ends if target == made.unit]
        term = (*start, *(self.take("in", rank, edge, back, made.microbatch) for edge in reads))
        for edge, (source, _) in ends:
            if source == made.unit:
                side = "out" if self._graph.crosses(edge) else "in"
                self.give(term, side, rank, edge, back, made.microbatch)
        return term

    def F(self, rank: int, made: Action) -> None:
        term = self.compute(rank, made, ("F", made.unit, made.microbatch), back=False)
        self.give(term, "kept", rank, *made[1:3])

    def B(self, rank: int, made: Action) -> None:
        kept = self.take("kept", rank, *made[1:3])
        self.give(self.compute(rank, made, ("B", kept), back=True), "weights", rank, *made[1:3])

    def W(self, rank: int, made: Action) -> None:
        self.fresh.setdefault(made.unit, Counter())[self.take("weights", rank, *made[1:3])] += 1

    def OUT(self, rank: int, made: Action) -> None:
        self.give(self.take("kept", rank, *made[1:3]), "host", rank, *made[1:3])

    def IN(self, rank: int, made: Action) -> None:
        self.give(self.take("host", rank, *made[1:3]), "kept", rank, *made[1:3])

    def GATHER(self, rank: int, made: Action) -> None:
        if made.unit in self.whole or self._graph.home[made.unit] != rank:
            raise Wrong(f"{made} of what is whole")
        self.whole.add(made.unit)

    def FREE(self, rank: int, made: Action) -> None:
        if made.unit not in self.whole or self._graph.home[made.unit] != rank:
            raise Wrong(f"{made} of what is not whole")
        self.whole.remove(made.unit)

    def REDUCE(self, rank: int, made: Action) -> None:
        if self._graph.home[made.unit] != rank:
            raise Wrong(f"{made} on rank {rank}")
        self._summed.setdefault(made.unit, Counter()).update(self.fresh.pop(made.unit, {}))

    def sender(self, made: Action) -> tuple[int, int]:
        """Ranks that send and receive."""
        if made.edge not in self._graph.edges:
            raise Wrong(f"{made}: no such edge")
        source, target = (self._graph.home[end] for end in made.edge)
        return (target, source) if made.back else (source, target)

    def POST(self, rank: int, made: Action) -> None:
        if rank not in (ends := self.sender(made)):
            raise Wrong(f"{made} on rank {rank}")
        launched = self._launched.setdefault((made.edge, made.back, rank), [])
        if rank == ends[0]:
            term = self.take("out", rank, made.edge, made.back, made.microbatch)
            self.give(term, "wire", made.edge, made.back, len(launched))
        launched.append(made.microbatch)
        self.open.add((rank, made))

    def WAIT(self, rank: int, made: Action) -> bool:
        if (rank, made._replace(op="POST")) not in self.open:
            raise Wrong(f"{made} on rank {rank} without a POST")
        ends = self.sender(made)
        mine = self._launched[made.edge, made.back, rank]
        place = len(mine) - 1 - mine[::-1].index(made.microbatch)
        if place >= len(self._launched.get((made.edge, made.back, ends[ends[0] == rank]), [])):
            return False
        self.open.remove((rank, made._replace(op="POST")))
        if rank == ends[1]:
            term = self.take("wire", made.edge, made.back, place)
            self.give(term, "in", rank, made.edge, made.back, made.microbatch)
        return True

    def STEP(self, rank: int, _: Action) -> bool:
        self._stepping.add(rank)
        if len(self._stepping) < self._ranks:
            return False
        self._stepped = self._stepped or {unit: Counter(terms) for unit, terms in self._summed.items()}
        return True
