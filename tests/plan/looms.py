"""Random placements of encoders and a decoder: together, apart, overlapping, in pipelines, frozen or not."""

import random
from typing import Any, NamedTuple

from weft.plan.pipelines import KINDS, SPLIT, compute
from weft.plan.placing import complete
from weft.plan.schedule import Action, Graph, Lists, Schedule
from weft.plan.weave import Loom, Order, Tower, weave

ORDERS: tuple[Order, ...] = ("first", "lead", "bubble")
VIRTUAL = {"interleaved": (2, 3), "zero_bubble": (1, 2), "zbv": (2,)}


class Drawn(NamedTuple):
    """What ``weave`` is given, and the kind of pipeline that it came from."""

    kind: str
    loom: Loom
    lists: Lists
    microbatches: int
    costs: dict[tuple[str, str], float]

    def cost(self, action: Action) -> float:
        """Of F, B and W of a stage, by microbatch."""
        return self.costs.get((action.op, action.unit), 0.0)

    def woven(self, order: Order, ahead: int = 0) -> tuple[Graph, Lists]:
        """The lists of all seats."""
        return weave(self.loom, self.lists, order, ahead, self.microbatches, self.cost)

    def schedule(self, order: Order, ahead: int = 0, **form: Any) -> Schedule:
        """Completed."""
        return complete(*self.woven(order, ahead), split=self.kind in SPLIT, cost=self.cost, **form)


def drawn(rng: random.Random, most: int = 3) -> Drawn:
    """A decoder on up to so many pipeline ranks, and up to three encoders on its seats or others."""
    kind, ranks, microbatches = rng.choice(KINDS), rng.randint(1, most), rng.randint(1, 6)
    graph, lists = compute(kind, ranks, rng.choice(VIRTUAL.get(kind, (1,))), microbatches)
    parts = [rng.choice((1, 1, 1, 2)) for _ in range(ranks)]  # seats of each pipeline rank
    seats_of = tuple(tuple(range(sum(parts[:i]), sum(parts[: i + 1]))) for i in range(ranks))
    seats = sum(parts)
    apart = rng.choice((0, 0, 1, 2))  # seats that have encoders only
    towers = [_tower(rng, name, seats, apart) for name in ("vision", "audio", "depth")[: rng.randint(1, 3)]]
    used = {seat for tower in towers for own in tower.seats for seat in own}
    number = {old: new for new, old in enumerate([*range(seats), *sorted(used - {*range(seats)})])}
    towers = [
        tower._replace(seats=tuple(tuple(number[seat] for seat in own) for own in tower.seats))
        for tower in towers
    ]
    joined = {s for s, (rank,) in graph.home.items() if len(seats_of[rank]) > 1 and rng.random() < 0.5}
    loom = Loom(graph, seats_of, tuple(Tower(*tower) for tower in towers), frozenset(joined))
    stages = loom.graph.home
    costs = {(op, s): rng.choice((0.3, 1.0, 2.5)) for op in "FBW" for s in stages}
    return Drawn(kind, loom, lists, microbatches, costs)


class _Tower(NamedTuple):
    name: str
    stages: tuple[str, ...]
    seats: tuple[tuple[int, ...], ...]
    every: int
    frozen: bool
    joined: frozenset[str]


def _tower(rng: random.Random, name: str, seats: int, apart: int) -> _Tower:
    """Stages have no seats in common, or the same."""
    pool = [*range(seats + apart)]
    if apart and rng.random() < 0.5:
        pool = pool[seats:]
    rng.shuffle(pool)
    count = rng.choice((1, 1, 2, 3)) if len(pool) > 1 else 1
    count = min(count, len(pool))
    cuts = sorted(rng.sample(range(1, len(pool)), count - 1)) if count > 1 else []
    own = [tuple(sorted(pool[a:b])) for a, b in zip([0, *cuts], [*cuts, len(pool)], strict=True)]
    if count == 1 and rng.random() < 0.5:
        own = [tuple(sorted(pool[: rng.randint(1, len(pool))]))]
    stages = tuple(f"{name}_{i}" for i in range(len(own)))
    joined = frozenset(s for s, each in zip(stages, own, strict=True) if len(each) > 1 and rng.random() < 0.5)
    return _Tower(name, stages, tuple(own), rng.choice((1, 1, 2, 3, 4)), rng.random() < 0.3, joined)


def weaves(count: int, first: int = 0) -> dict[str, Schedule]:
    """Woven schedules by name, of so many seeds."""
    found: dict[str, Schedule] = {}
    for seed in range(first, first + count):
        rng = random.Random(seed)
        made, order = drawn(rng), rng.choice(ORDERS)
        form = {"lookahead": rng.randrange(3)}
        whole = made.loom.graph
        together = all(len(seats) == 1 or stage in whole.joined for stage, seats in whole.home.items())
        if together and rng.random() < 0.5:
            form |= {"level": 3, "gather": "stage"}
        found[f"woven {seed} {made.kind} {order} {form}"] = made.schedule(order, **form)
    return found
