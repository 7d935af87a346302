"""Random ends of routes, and routes carried out in one process, for tests of plans and of ranks."""

import random
from collections.abc import Mapping, Sequence

import numpy as np

from weft.plan.route import End, Kind, Route
from weft.plan.runs import Holding, Run

Values = dict[int, np.ndarray]
MOST = 40  # rows of a random end
KINDS: tuple[Kind, ...] = ("unique", "replicated", "partial")


def cut(rows: int, parts: int, choose: random.Random) -> list[Run]:
    """All rows, in runs between random points."""
    points = sorted({0, rows, *(choose.randrange(rows + 1) for _ in range(parts - 1))})
    return [Run(start, stop - start) for start, stop in zip(points, points[1:], strict=False)]


def contiguous(rows: int, parts: int, choose: random.Random) -> list[list[Run]]:
    """One run for each part, of any lengths."""
    points = sorted([0, rows, *(choose.randrange(rows + 1) for _ in range(parts - 1))])
    return [[Run(start, stop - start)] for start, stop in zip(points, points[1:], strict=False)]


def strided(rows: int, parts: int, choose: random.Random) -> list[list[Run]]:
    """Blocks dealt out in turns."""
    block = choose.choice([1, 3])
    return [
        [Run(at, min(block, rows - at)) for at in range(i * block, rows, parts * block)] for i in range(parts)
    ]


def zigzag(rows: int, parts: int, choose: random.Random) -> list[list[Run]]:
    """A part from the front and one from the back."""
    pieces = [runs[0] for runs in contiguous(rows, 2 * parts, choose)]
    return [[pieces[i], pieces[-1 - i]] for i in range(parts)]


def samples(rows: int, parts: int, choose: random.Random) -> list[list[Run]]:
    """Data-parallel samples, each cut into context-parallel parts."""
    cp = choose.choice([n for n in (1, 2, 3, 4) if parts % n == 0])
    found: list[list[Run]] = []
    for (sample,) in contiguous(rows, parts // cp, choose):
        shares = choose.choice([contiguous, zigzag])(sample.length, cp, choose)
        found += [[Run(sample.start + run.start, run.length) for run in runs] for runs in shares]
    return found


def scattered(rows: int, parts: int, choose: random.Random) -> list[list[Run]]:
    """Random runs in random orders."""
    holdings: list[list[Run]] = [[] for _ in range(parts)]
    for run in cut(rows, choose.randint(1, 3 * parts), choose):
        choose.choice(holdings).append(run)
    for runs in holdings:
        choose.shuffle(runs)
    return holdings


ORDERS = (contiguous, strided, zigzag, samples, scattered)


def random_end(rows: int, ranks: Sequence[int], choose: random.Random) -> End:
    """All rows on ``ranks``: in some order, each part on a group of ranks, or each run on random ones."""
    kind = choose.choice(KINDS)
    if kind == "unique":
        parts, copies = choose.choice(ORDERS)(rows, len(ranks), choose), 1
    elif choose.random() < 0.5:
        copies = choose.choice([n for n in (1, 2, 4) if len(ranks) % n == 0])
        parts = choose.choice(ORDERS)(rows, len(ranks) // copies, choose)
    else:
        parts, copies = [[] for _ in ranks], 1
        for run in cut(rows, choose.randint(1, 3 * len(ranks)), choose):
            for own in choose.sample(parts, choose.randint(1, len(ranks))):
                own.append(run)
    held = {rank: [run for run in parts[i // copies] if run.length] for i, rank in enumerate(ranks)}
    return End({rank: tuple(runs) for rank, runs in held.items()}, kind)


def random_pair(seed: int) -> tuple[End, End]:
    """Two ends on at most 8 ranks, which may be the same, different (as pipelines') or overlapping."""
    choose = random.Random(seed)
    rows = choose.choice([0, 1, 7, MOST])
    wide, tall, first = choose.randint(1, 4), choose.randint(1, 4), choose.randint(0, 4)
    source = random_end(rows, range(wide), choose)
    target = random_end(rows, range(first, first + tall), choose)
    if choose.random() < 0.3:  # a target that does not want everything
        target = End({rank: runs[1:] for rank, runs in target.holdings.items()}, target.kind)
    return source, target


def even(rows: int, ranks: Sequence[int]) -> End:
    """Contiguous parts as even as can be."""
    at = [rows * i // len(ranks) for i in range(len(ranks) + 1)]
    parts = zip(ranks, at, at[1:], strict=False)
    return End({rank: (Run(start, stop - start),) for rank, start, stop in parts})


def whole(rows: int, ranks: Sequence[int], kind: Kind = "replicated") -> End:
    """All rows on all ranks."""
    return End({rank: (Run(0, rows),) for rank in ranks}, kind)


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


def values(end: End, x: Values, rows: int) -> np.ndarray:
    """What an end means: [rows, width], of replicas any one, of summands their sum."""
    out = np.zeros((rows, 2))
    for rank, holding in end.holdings.items():
        at = tokens(holding)
        out[at] = x[rank] + (out[at] if end.kind == "partial" else 0)
    return out


def alike(end: End, x: Values, rows: int) -> Values:
    """The same numbers on all replicas."""
    if end.kind != "replicated":
        return x
    every = values(end, x, rows)
    return {rank: every[tokens(holding)] for rank, holding in end.holdings.items()}


def numbers(ends: Mapping[int, int], seed: int, width: int = 2) -> Values:
    """Small integers for the rows of an end: sums of products are exact."""
    draw = np.random.default_rng(seed)
    return {rank: draw.integers(-9, 9, (rows, width)).astype(float) for rank, rows in ends.items()}


def lower_bound(source: End, target: End, every: int = MOST) -> int:
    """Rows that must travel, one at a time; of what is on a rank that it is for, none."""
    has, wants = (
        {row: {rank for rank, own in end.items() if row in own} for row in range(every)}
        for end in ({r: set(tokens(h)) for r, h in e.holdings.items()} for e in (source, target))
    )
    return sum(
        not from_ & to
        for row in range(every)
        if wants[row]
        for from_ in ([{s} for s in has[row]] if source.kind == "partial" else [has[row]])
        for to in ([wants[row]] if target.kind == "partial" else [{t} for t in wants[row]])
    )
