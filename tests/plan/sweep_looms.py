"""Many random placements, outside pytest: type checks of every call would take most of the time.

python -W error -m tests.plan.sweep_looms 0 300     # 300 placements, from seed 0

Each is woven, proved, run by the machine of ``meaning`` and simulated; so are its lists for evaluation.
"""

import argparse
import sys

from tests.plan.looms import weaves
from tests.plan.meaning import oracle, outcome
from weft.plan.placing import forward_only
from weft.plan.prove import prove
from weft.plan.schedule import COMPUTE, Schedule
from weft.plan.simulate import simulate


def wrong(schedule: Schedule) -> str:
    """What is not as it must be."""
    graph, proof = schedule.graph, prove(schedule)
    if proof.faults:
        return proof.text
    if outcome(schedule) != oracle(graph, schedule.microbatches):
        return "other gradients"
    simulate(schedule, lambda done: float(done.op in COMPUTE), lambda post: 0.1)
    for microbatches in (1, 7):
        proof = prove(forward_only(graph, microbatches), training=False)
        if proof.faults:
            return f"evaluation: {proof.text}"
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    found = {name: words for name, made in weaves(asked.count, asked.first).items() if (words := wrong(made))}
    sys.stdout.writelines(f"{name}: {words}\n" for name, words in found.items())
    raise SystemExit(bool(found))
