"""How long compiling a route takes: a microbatch of 1,000,000 rows from 64 ranks to 64, 8 on a node.

    python benchmarks/routes.py

Ends are made of columns and compiled, again and again in turns, so that a busy machine is busy for all of
them; the best of a few medians is given, on the clock and of the processor. Runs are counted on every rank:
10,000 runs on groups of 8 ranks with the same are 1,250 different ones. Two numbers bound a route: the runs,
whose borders are sorted, and the bytes of columns and legs; beside each case is how long it takes just to
sort those and to copy these.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from weft.plan.route import End, Kind, Route, compile_route

RANKS, ROWS = 64, 1_000_000
OUT = Path(__file__).with_suffix(".json")
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def runs(count: int, copies: int, draw: np.random.Generator, scattered: bool = False) -> Columns:
    """World rank, start and length of runs that cover all rows ``copies`` times, on random ranks.

    Copies of a run are on the ranks of one group of so many, or on ``scattered`` ones.
    """
    different = count // copies
    points = np.sort(draw.choice(ROWS - 1, different - 1, replace=False) + 1)
    start, length = np.append(0, points), np.diff(points, prepend=0, append=ROWS)
    if scattered:
        one = draw.integers(RANKS, size=different)
        step = draw.integers(1, RANKS // copies, size=different)
        rank = (one[:, None] + step[:, None] * np.arange(copies)) % RANKS
    else:
        rank = draw.integers(RANKS // copies, size=different)[:, None] * copies + np.arange(copies)
    sort = np.argsort(rank.ravel(), kind="stable")
    return rank.ravel()[sort], np.repeat(start, copies)[sort], np.repeat(length, copies)[sort]


def cases(count: int) -> dict[str, tuple[Columns, Kind, Columns, Kind]]:
    """By name, both ends."""
    draw = np.random.default_rng(count)
    one, other = runs(count, 1, draw), runs(count, 1, draw)
    some, more = runs(count, 8, draw), runs(count, 8, draw)
    wild = runs(count, 2, draw, scattered=True)
    return {
        "unique to unique": (one, "unique", other, "unique"),
        "8 replicas to unique": (some, "replicated", other, "unique"),
        "unique to 8 replicas": (one, "unique", more, "replicated"),
        "8 replicas to 8 replicas": (some, "replicated", more, "replicated"),
        "8 replicas to 8 partial": (some, "replicated", more, "partial"),
        "unique to 8 partial": (one, "unique", more, "partial"),
        "8 partial to unique": (some, "partial", other, "unique"),
        "2 scattered replicas to unique": (wild, "replicated", other, "unique"),
    }


def made(source: Columns, kind: Kind, target: Columns, other: Kind) -> Route:
    """What is measured: columns to a route."""
    return compile_route(End.of(*source, kind), End.of(*target, other), lambda rank: rank // 8)


def least(source: Columns, target: Columns, route: Route) -> tuple[int, Callable[[], object]]:
    """Bytes of columns and legs, and what sorts the borders and copies those."""
    borders = np.concatenate([source[1], source[1] + source[2], target[1], target[1] + target[2]])
    columns = np.concatenate([*source, *target, route.table.ravel()])
    return columns.nbytes, lambda: (np.sort(borders), columns.copy())


def medians(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each, on the clock and of the processor, taken in turns."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, one in work.items():
            start, used = time.perf_counter(), time.process_time()
            one()
            spent[name].append((time.perf_counter() - start, time.process_time() - used))
    both = {name: map(statistics.median, zip(*times, strict=True)) for name, times in spent.items()}
    return {name: (1e3 * clock, 1e3 * used) for name, (clock, used) in both.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeat", type=int, default=5, help="medians of which the best is given")
    given = parser.parse_args()
    np.ones(3_900_000)  # as in a process that has freed large arrays, memory stays with the allocator
    told = []
    for count in (4_000, 10_000):
        ends = cases(count)
        routes = {name: made(*case) for name, case in ends.items()}
        bounds = {name: least(case[0], case[2], routes[name]) for name, case in ends.items()}
        work: dict[str, Callable[[], object]] = {
            name: lambda case=case: made(*case) for name, case in ends.items()
        }
        work |= {f"{name}, bound": limit for name, (_, limit) in bounds.items()}
        taken = [medians(work, given.rounds) for _ in range(given.repeat)]
        for name in ends:
            clock, used = (min(one[name][i] for one in taken) for i in range(2))
            told.append(
                {
                    "case": name,
                    "runs of an end": count,
                    "legs": len(routes[name].table),
                    "MB": round(bounds[name][0] / 1e6, 2),
                    "ms": round(clock, 2),
                    "processor ms": round(used, 2),
                    "sort and copy ms": round(min(one[f"{name}, bound"][0] for one in taken), 2),
                }
            )
            print(*told[-1].values(), sep=" | ")
    about = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__}
    about |= {"rows": ROWS, "ranks": RANKS, "rounds": given.rounds, "best of medians": given.repeat}
    OUT.write_text(json.dumps({"about": about, "routes": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
