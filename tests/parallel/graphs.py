"""Graphs of stages that are no chains, and lists for them in any possible order."""

import random

from weft.plan.placing import complete
from weft.plan.schedule import COMPUTE, Action, Edge, Graph, Lists, Schedule


def any_graph(rng: random.Random) -> Graph:
    """Up to eight stages on up to four ranks; some have many inputs, some none, some no reader."""
    ranks = rng.randint(1, 4)
    names = [f"s{i}" for i in range(rng.randint(ranks, ranks + 4))]
    homes = [*range(ranks), *(rng.randrange(ranks) for _ in names[ranks:])]
    rng.shuffle(homes)
    edges = [Edge(a, b) for i, b in enumerate(names) for a in names[:i] if rng.random() < 0.45]
    rng.shuffle(edges)
    return Graph(dict(zip(names, homes, strict=True)), tuple(edges))


def any_lists(rng: random.Random, graph: Graph, microbatches: int) -> Lists:
    """Everything in a random order that it can have."""
    made: list[list[Action]] = [[] for _ in range(graph.ranks)]
    left = {Action(op, stage, i) for op in COMPUTE for stage in graph.home for i in range(microbatches)}
    weights = {"F": 1.0, "B": rng.choice([1.0, 3.0, 10.0]), "W": rng.choice([1.0, 30.0])}
    while left:
        ready = sorted(one for one in left if left.isdisjoint(needs(graph, one)))
        (chosen,) = rng.choices(ready, [weights[one.op] for one in ready])
        left.remove(chosen)
        made[graph.home[chosen.unit]].append(chosen)
    return tuple(map(tuple, made))


def needs(graph: Graph, one: Action) -> set[Action]:
    """What comes before a computation."""
    if one.op == "W":
        return {one._replace(op="B")}
    if one.op == "B":
        readers = {one._replace(unit=edge.target) for edge in graph.edges if edge.source == one.unit}
        return {one._replace(op="F"), *readers}
    before = {one._replace(microbatch=one.microbatch - 1)} if one.microbatch else set()
    return before | {one._replace(unit=edge.source) for edge in graph.edges if edge.target == one.unit}


def any_schedule(seed: int) -> Schedule | None:
    """Any order of any graph; None where it keeps more than the bound that was drawn."""
    rng = random.Random(seed)
    graph, microbatches = any_graph(rng), rng.randint(1, 4)
    lists = any_lists(rng, graph, microbatches)
    form = {
        "level": 3,
        "gather": rng.choice(["unit", "stage"]),
        "lookahead": rng.randrange(4),
        "split": rng.random() < 0.5,
        "resident": rng.choice([0, 0, 2, 3, 4]),
    }
    try:
        return complete(graph, lists, **form)
    except ValueError:
        return None
