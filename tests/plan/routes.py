"""Random ends of routes, and routes carried out in one process, for tests of plans and of ranks."""

import random
from collections.abc import Sequence

import numpy as np

from weft.plan.route import End, Route
from weft.plan.runs import Holding, Run

Values = dict[int, np.ndarray]


def cut(rows: int, parts: int, choose: random.Random) -> list[Run]:
    """All rows, in runs between random points."""
    points = sorted({0, rows, *(choose.randrange(rows + 1) for _ in range(parts - 1))})
    return [Run(start, stop - start) for start, stop in zip(points, points[1:], strict=False)]


def random_end(rows: int, ranks: Sequence[int], choose: random.Random, copies: int = 1) -> End:
    """All rows dealt to ``ranks`` in random runs and orders, each run to as many as ``copies`` of them."""
    holdings: dict[int, list[Run]] = {rank: [] for rank in ranks}
    for run in cut(rows, choose.randint(1, 3 * len(ranks)), choose):
        for rank in choose.sample(list(ranks), choose.randint(1, min(copies, len(ranks)))):
            holdings[rank].append(run)
    for runs in holdings.values():
        choose.shuffle(runs)
    kind = "unique" if copies == 1 else "replicated"
    return End({rank: tuple(runs) for rank, runs in holdings.items()}, kind)


def random_pair(seed: int) -> tuple[End, End]:
    """Two ends on few ranks, which may be the same, different or overlapping."""
    choose = random.Random(seed)
    rows, first = choose.choice([0, 1, 7, 40]), choose.randint(0, 4)
    source = random_end(rows, range(choose.randint(1, 4)), choose, choose.randint(1, 4))
    target = random_end(rows, range(first, first + choose.randint(1, 4)), choose, choose.randint(1, 4))
    if choose.random() < 0.3:  # a target that does not want everything
        target = End({rank: runs[1:] for rank, runs in target.holdings.items()}, target.kind)
    return source, target


def even(rows: int, ranks: Sequence[int]) -> End:
    """Contiguous parts as even as can be."""
    at = [rows * i // len(ranks) for i in range(len(ranks) + 1)]
    parts = zip(ranks, at, at[1:], strict=False)
    return End({rank: (Run(start, stop - start),) for rank, start, stop in parts})


def whole(rows: int, ranks: Sequence[int]) -> End:
    """All rows on all ranks."""
    return End({rank: (Run(0, rows),) for rank in ranks}, "replicated")


def tokens(holding: Holding) -> list[int]:
    """Each row of a holding."""
    return [row for run in holding for row in range(run.start, run.stop)]


def carried(route: Route, x: Values) -> Values:
    """What a route, or a transposed one, makes of the rows of its sources: sums, one leg at a time."""
    width = next((rows.shape[1] for rows in x.values()), 0)
    out = {rank: np.zeros((rows, width)) for rank, rows in route.targets.items()}
    for source, start, target, place, length in route.legs:
        out[target][place : place + length] += x[source][start : start + length]
    return out


def numbers(ends: dict[int, int], seed: int, width: int = 2) -> Values:
    """Small integers for the rows of an end: sums of products are exact."""
    draw = np.random.default_rng(seed)
    return {rank: draw.integers(-9, 9, (rows, width)).astype(float) for rank, rows in ends.items()}
