"""Multimodal plans on threads, outside pytest: type checks of every call would take most of the time.

python -W error -m tests.parallel.mixed_sweep FIRST LAST     # random plans by seed
python -W error -m tests.parallel.mixed_sweep classes        # one or more for each class of configurations
"""

import sys
import traceback

import torch

from tests.parallel.mixed import differences
from tests.parallel.mixed_plans import CLASSES, Mixed, drawn
from weft.parallel.threads import run_threads
from weft.plan.check import check_run


def faults(case: Mixed) -> str:
    """What is wrong with a plan, or nothing."""
    config = case.config()
    if problems := check_run(config, case.ranks):
        return "\n".join(map(str, problems))
    try:
        found = run_threads(case.ranks, lambda comm: differences(config, comm))
    except Exception:  # noqa: BLE001 - told with the plan, and the others go on
        return traceback.format_exc()
    return "\n".join(f"rank {rank}: {lines[:5]}" for rank, lines in enumerate(found) if lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, *last = sys.argv[1:]
    cases = {str(n): drawn(n) for n in range(int(first), int(last[0]))} if last else CLASSES
    wrong = {name: (case, text) for name, case in cases.items() if (text := faults(case))}
    for name, (case, text) in wrong.items():
        print(f"{name}: {case}\n{text}")  # noqa: T201
    raise SystemExit(bool(wrong))
