"""Graphs of stages that are no chains, and lists for them in any possible order."""

import random

from weft.plan.placing import complete
from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Lists, Schedule

Seated = tuple[int, Action]
"""A seat and what it does."""


def any_graph(rng: random.Random, simple: bool = True) -> Graph:
    """Up to eight stages on up to four seats; some have many inputs, some none, some no reader.

    Unless ``simple``, some are on several seats, take several microbatches at a time, are joined or frozen,
    and edges are routed.
    """
    ranks = rng.randint(1, 4)
    names = [f"s{i}" for i in range(rng.randint(ranks, ranks + 4))]
    homes = [*range(ranks), *(rng.randrange(ranks) for _ in names[ranks:])]
    rng.shuffle(homes)
    edges = [Edge(a, b) for i, b in enumerate(names) for a in names[:i] if rng.random() < 0.45]
    rng.shuffle(edges)
    home = {name: (seat,) for name, seat in zip(names, homes, strict=True)}
    if simple:
        return Graph(home, tuple(edges))
    some = [tuple(sorted(rng.sample(range(ranks), rng.randint(1, ranks)))) for _ in range(2)]
    home = {s: rng.choice([rng.choice(some), own]) if s != "s0" else own for s, own in home.items()}
    missing = set(range(ranks)) - {seat for own in home.values() for seat in own}
    home["s0"] = tuple(sorted({*home["s0"], *missing}))
    overlap = {e for e in edges if set(home[e[0]]) & set(home[e[1]]) and home[e[0]] != home[e[1]]}
    frozen: set[str] = set()
    for name in names:
        before = {edge.source for edge in edges if edge.target == name}
        if before <= frozen and rng.random() < 0.3:
            frozen.add(name)
    return Graph(
        home,
        tuple(edges),
        {name: rng.choice((1, 2, 4)) for name in names[1:]},
        frozenset(frozen),
        frozenset(overlap | {edge for edge in edges if rng.random() < 0.2}),
        frozenset(name for name in names if len(home[name]) > 1 and rng.random() < 0.5),
    )


def any_lists(rng: random.Random, graph: Graph, microbatches: int) -> Lists:
    """Everything in a random order that it can have; joined stages do B and W as one.

    A stage on several seats has its backward passes in one order, as both ends of its edges must.
    """
    made: list[list[Action]] = [[] for _ in range(graph.seats)]
    left = {
        (seat, Action(op, stage, i))
        for stage, seats in graph.home.items()
        for op in (COMPUTE if stage not in graph.frozen else "F")
        for i in range(graph.passes(stage, microbatches))
        for seat in seats
    }
    order: dict[str, list[int]] = {}  # of backward passes
    weights = {"F": 1.0, "B": rng.choice([1.0, 3.0, 10.0]), "W": rng.choice([1.0, 30.0])}
    while left:
        ready = sorted(one for one in left if left.isdisjoint(needs(graph, one, microbatches)))
        ready = [one for one in ready if in_turn(one, order, made)]
        ((seat, chosen),) = rng.choices(ready, [weights[one.op] for _, one in ready])
        if chosen.op == "B" and chosen.microbatch not in order.setdefault(chosen.unit, []):
            order[chosen.unit].append(chosen.microbatch)
        together = graph.meeting(chosen) if chosen.op != "STEP" else ()
        both = [chosen, chosen._replace(op="W")] if together and chosen.op == "B" else [chosen]
        for other in together or (seat,):
            made[other] += both
            left -= {(other, one) for one in both}
    return tuple(map(tuple, made))


def in_turn(one: Seated, order: dict[str, list[int]], made: list[list[Action]]) -> bool:
    """Whether a backward pass is the next of its stage on this seat, as far as the order is known."""
    seat, (op, stage, i, *_) = one
    known, done = order.get(stage, []), sum(each[:2] == ("B", stage) for each in made[seat])
    return op != "B" or (known[done] == i if done < len(known) else i not in known)


def needs(graph: Graph, one: Seated, microbatches: int) -> set[Seated]:
    """What comes before a computation."""
    seat, done = one
    here = graph.meeting(done) or (seat,)
    if done.op == "W":
        return {(seat, done._replace(op="B"))}
    before = {need for other in here for need in graph.needs(other, done, microbatches)}
    if done.op == "B":
        return before | {(other, done._replace(op="F")) for other in here}
    earlier = done._replace(microbatch=done.microbatch - 1)
    return before | ({(other, earlier) for other in here} if done.microbatch else set())


def any_schedule(seed: int, simple: bool = True) -> Schedule | None:
    """Any order of any graph; None where it keeps more than the bound that was drawn."""
    rng = random.Random(seed)
    graph, microbatches = any_graph(rng, simple), rng.randint(1, 4)
    lists = any_lists(rng, graph, microbatches)
    joined = all(len(seats) == 1 or stage in graph.joined for stage, seats in graph.home.items())
    form = {
        "level": 3,
        "gather": rng.choice(["unit", "stage"]) if joined else "unit",
        "lookahead": rng.randrange(4),
        "split": rng.random() < 0.5,
        "resident": rng.choice([0, 0, 2, 3, 4]),
    }
    try:
        return complete(graph, lists, **form)
    except ValueError:
        return None
