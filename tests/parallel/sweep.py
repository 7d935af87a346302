"""Some of the plans on threads, outside pytest: type checks of every call would take most of the time.

python -W error -m tests.parallel.sweep FIRST LAST      # prints the plans that differ from one process
"""

import argparse
import traceback

import torch

from tests.parallel import equal, plans
from weft.parallel.threads import run_threads


def faults(case: plans.Case) -> str:
    """What is wrong with a plan, or nothing."""
    try:
        found = run_threads(case.ranks, lambda comm: equal.differences(case, comm))
    except Exception:  # noqa: BLE001 - told with the plan, and the others go on
        return traceback.format_exc()
    return "\n".join(f"rank {rank}: {lines[:5]}" for rank, lines in enumerate(found) if lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    wrong = {
        case: text for case in plans.cases(plans.COUNT)[asked.first : asked.last] if (text := faults(case))
    }
    for case, text in wrong.items():
        print(f"{case}\n{text}")  # noqa: T201
    raise SystemExit(bool(wrong))
