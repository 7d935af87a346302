"""Valid schedules of all kinds, and schedules with one action changed."""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from tests.plan.looms import weaves
from weft.plan.pipelines import KINDS, compute
from weft.plan.placing import complete
from weft.plan.schedule import Action, Edge, Graph, Schedule


@cache
def valid() -> dict[str, Schedule]:
    """More than 200 by name: of all kinds and sizes, with encoders, and of a graph that is no chain."""
    return dict(_valid())


def _valid() -> Iterator[tuple[str, Schedule]]:
    stages = {"interleaved": (1, 2, 3), "zero_bubble": (1, 2), "zbv": (2,)}
    forms = ({}, {"level": 3, "gather": "stage"}, {"split": True, "lookahead": 2})
    sizes = [(ranks, count) for ranks in (1, 2, 3) for count in (1, 2, 5)] + [(4, 3), (4, 7)]
    for kind in KINDS:
        for virtual in stages.get(kind, (1,)):
            for ranks, count in sizes:
                graph, lists = compute(kind, ranks, virtual, count)
                for form in forms if ranks < 4 else forms[:1]:
                    yield f"{kind} {ranks} {virtual} {count} {form}", complete(graph, lists, **form)
    yield "no lookahead", complete(*compute("1f1b", 3, 1, 4), lookahead=0)
    yield "offload", complete(*compute("1f1b", 3, 1, 4), resident=2)
    yield from weaves(30).items()
    for count in (1, 2, 3, 5):
        yield f"diamond {count}", diamond(count)


def diamond(microbatches: int) -> Schedule:
    """Two stages that read one and feed another, and an edge past them; two of the four share a rank."""
    pairs = (("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"))
    graph = Graph({"a": (0,), "b": (1,), "c": (0,), "d": (2,)}, tuple(Edge(*pair) for pair in pairs))
    lists: list[tuple[Action, ...]] = []
    for stages in map(graph.at, range(3)):
        every = range(microbatches)
        made = [Action("F", stage, i) for i in every for stage in stages]
        made += [Action(op, stage, i) for i in every for stage in stages[::-1] for op in ("B", "W")]
        lists.append(tuple(made))
    return complete(graph, tuple(lists))


def mutants(schedule: Schedule, rng: random.Random) -> Iterator[tuple[str, Schedule]]:
    """What was done, and the schedule with one action deleted, doubled, or swapped with another of its list.

    Endless; list, change and places are random. Swaps are with any other action or with the next one, which
    more often leaves a schedule valid.
    """
    while True:
        rank = rng.randrange(len(schedule.lists))
        actions = list(schedule.lists[rank])
        change = rng.choice(("delete", "duplicate", "swap", "neighbours"))
        one, other = rng.randrange(len(actions)), rng.randrange(len(actions))
        if change == "neighbours":
            other = min(one + 1, len(actions) - 1)
        if change == "delete":
            words = f"delete {actions.pop(one)} at {one}"
        elif change == "duplicate":
            words = f"duplicate {actions[one]} of {one} at {other}"
            actions.insert(other, actions[one])
        else:
            words = f"swap {actions[one]} at {one} with {actions[other]} at {other}"
            actions[one], actions[other] = actions[other], actions[one]
        if tuple(actions) != schedule.lists[rank]:
            lists = (*schedule.lists[:rank], tuple(actions), *schedule.lists[rank + 1 :])
            yield f"rank {rank}: {words}", replace(schedule, lists=lists)
