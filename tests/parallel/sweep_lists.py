"""Many lists on threads, outside pytest: type checks of every call would take most of the time.

python -W error -m tests.parallel.sweep_lists valid 0 3     # every third of the valid lists, from the first
python -W error -m tests.parallel.sweep_lists mutants 7 1   # mutants of all valid lists, drawn with seed 7
python -W error -m tests.parallel.sweep_lists any 0 100     # 100 random graphs in random orders, from seed 0
python -W error -m tests.parallel.sweep_lists seats 0 100   # the same with seats, groups, frozen and joined
python -W error -m tests.parallel.sweep_lists woven 0 100   # 100 random placements of encoders, from seed 0
python -W error -m tests.parallel.sweep_lists torn 0 100    # mutants of these

The last line of what is printed counts what ran; other lines tell what differs from plain autograd.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import torch

from tests.parallel import nets
from tests.parallel.graphs import any_schedule
from tests.plan.looms import weaves
from tests.plan.mutants import mutants, valid
from weft.parallel.threads import run_threads
from weft.plan.prove import prove
from weft.plan.schedule import Schedule

TIMEOUT = 20.0  # seconds until a rank that waits for another counts as hanging
CHANGES = 3  # sorts of mutants: deleted, doubled, swapped


def wrong(schedule: Schedule) -> list[str]:
    """How a step on threads differs from the oracle."""
    try:
        results = run_threads(len(schedule.lists), lambda comm: nets.step(schedule, comm), timeout=TIMEOUT)
    except Exception as error:  # noqa: BLE001 - told with the list, and the others go on
        return [repr(error)]
    return nets.faults(results, schedule.graph, schedule.microbatches)


def one_of_each(schedule: Schedule, rng: random.Random) -> Iterator[tuple[str, Schedule]]:
    """A mutant of each sort."""
    found: dict[str, Schedule] = {}
    for words, mutant in mutants(schedule, rng):
        found.setdefault(words.split()[2], mutant)
        if len(found) == CHANGES:
            return iter(found.items())
    raise AssertionError("mutants end")


def drawn(sort: str, first: int, count: int) -> Iterator[tuple[str, Schedule | None]]:
    """Names of what was done, and what came of it; see the head of this file."""
    if sort == "valid":
        yield from islice(valid().items(), first, None, count)
    elif sort == "woven":
        yield from weaves(count, first).items()
    elif sort == "torn":
        rng = random.Random(first)
        for schedule in weaves(count, first).values():
            yield from one_of_each(schedule, rng)
    elif sort in ("any", "seats"):
        seeds = range(first, first + count)
        yield from ((f"{sort} {seed}", any_schedule(seed, sort == "any")) for seed in seeds)
    else:
        rng = random.Random(first)
        for schedule in valid().values():
            yield from one_of_each(schedule, rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sort", choices=("valid", "mutants", "any", "seats", "woven", "torn"))
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    verdicts: Counter[str] = Counter()
    for name, schedule in drawn(asked.sort, asked.first, asked.count):
        mutant = asked.sort in ("mutants", "torn")
        kind = name.split()[0] if mutant else "list"
        proof = schedule and prove(schedule)
        if schedule is None or proof is None or proof.faults:
            verdicts[f"{kind} refused"] += 1
            if proof is not None and not mutant:
                print(f"{name}: {proof.text}")  # noqa: T201
                verdicts["wrong"] += 1
            continue
        verdicts[f"{kind} ran"] += 1
        if found := wrong(schedule):
            verdicts["wrong"] += 1
            print(f"{name}: {found[:3]}\n{schedule.text}")  # noqa: T201
    print(json.dumps(verdicts))  # noqa: T201
    raise SystemExit(bool(verdicts["wrong"]))
