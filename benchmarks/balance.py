"""How evenly encoder ranks are loaded: sequences assigned by cost, and in equal numbers.

    python benchmarks/balance.py

Sizes are log-normal (sigma 1.0, median 1024, clipped to 256 to 16384 rows), p rows cost p (p + 7680), and 64
ranks have 16 sequences each, or 4. A sequence of more than a quarter of a rank's mean may be cut over
``cp`` ranks. Seeds 0 to 99; what is printed is the greatest load over the mean.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from weft.plan.assign import Bins, assign, equal_counts, loads_of, spread

RANKS, SEEDS = 64, 100
OUT = Path(__file__).with_suffix(".json")


def sizes(seed: int, items: int) -> list[int]:
    """Rows of sequences."""
    draw = np.random.default_rng(seed).lognormal(np.log(1024), 1.0, RANKS * items)
    return np.clip(draw, 256, 16384).astype(int).tolist()


def cost(rows: int) -> float:
    """In units of what a row costs in the layers' matrix products over 7680."""
    return float(rows) * (rows + 7680)


def ways(items: int) -> dict[str, Callable[[list[float], list[int]], Bins]]:
    """By name, how sequences are dealt out."""
    home = [i // items for i in range(RANKS * items)]  # where they would be in equal numbers
    named: dict[str, Callable[[list[float], list[int]], Bins]] = {
        "equal counts": lambda _, rows: equal_counts(RANKS, rows)
    }
    for cp in (1, 2, 4, 8):
        named[f"by cost, cp={cp}"] = lambda costs, rows, cp=cp: assign(
            costs, RANKS, rows=rows, cp=cp, grain=4
        )
    named["by cost, cp=8, near"] = lambda costs, rows: assign(
        costs, RANKS, rows=rows, cp=8, grain=4, near=home
    )
    return named


def measured(name: str, items: int, seeds: int = SEEDS) -> tuple[list[float], float]:
    """Of each seed the greatest load over the mean; the part of rows that are where equal counts put them."""
    way, found, kept, total = ways(items)[name], list[float](), 0, 0
    for seed in range(seeds):
        rows = sizes(seed, items)
        costs = [cost(n) for n in rows]
        bins = way(costs, rows)
        found.append(spread(loads_of(bins, costs)))
        kept += sum(p.rows for i, own in enumerate(bins) for p in own if p.sequence // items == i)
        total += sum(rows)
    return found, kept / total


def main() -> None:
    """Measure, print, write."""
    told = []
    for items in (16, 4):
        for name in ways(items):
            found, kept = measured(name, items)
            told.append(
                {
                    "items of a rank": items,
                    "assignment": name,
                    "mean": round(float(np.mean(found)), 4),
                    "95th percentile": round(float(np.percentile(found, 95)), 4),
                    "greatest": round(max(found), 4),
                    "rows that stay": round(kept, 3),
                }
            )
            print(*told[-1].values(), sep=" | ")
    OUT.write_text(json.dumps({"ranks": RANKS, "seeds": SEEDS, "loads": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
