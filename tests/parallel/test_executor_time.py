"""The simulator foretells how long a step takes, given what its actions take."""

import pytest

from tests.gangs import Gangs
from weft.plan.simulate import bubble_formula

pytestmark = pytest.mark.slow  # clocks mean something only where nothing else runs

HERE = "tests.parallel.timed"
STAGES = {"interleaved": 2, "zbv": 2}
KINDS = ("1f1b", "interleaved", "zero_bubble", "zbv")
TRIES = 6  # on a busy machine processes lose time to others


def near(gangs: Gangs, ranks: int, job: str, arguments: dict, close: float) -> tuple[float, list, list]:
    """How far the makespan of the best of some tries is from the simulated one; both with bubble shares.

    Once it is ``close``, that is enough.
    """
    found = []
    for _ in range(TRIES):
        executed, simulated = gangs(ranks).run(f"{HERE}:{job}", arguments, timeout=120)[0]
        found.append((abs(simulated[0] / executed[0] - 1), executed, simulated))
        if found[-1][0] < close:
            break
    print(f"{job} {arguments} on {ranks}: {found}")  # noqa: T201 - shown by pytest -s
    return min(found)


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sleeping(processes: Gangs, kind: str, ranks: int) -> None:
    """Actions of set cost: the makespan, and the bubble share of the formula."""
    microbatches = 2 * ranks - 1 if kind == "zbv" else 2 * ranks
    arguments = {"kind": kind, "microbatches": microbatches, "seconds": 0.01 * ranks, "count": 1}
    off, executed, simulated = near(processes, ranks, "napping", arguments, 0.05)
    share = bubble_formula(kind, ranks, STAGES.get(kind, 1), microbatches)
    assert off < 0.2
    assert simulated[1] == pytest.approx(share, abs=1e-9)
    assert executed[1] == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_computing(processes: Gangs, kind: str) -> None:
    """Real arithmetic of measured cost on two processes of one thread."""
    off, *_ = near(processes, 2, "computing", {"kind": kind, "microbatches": 6, "count": 5}, 0.15)
    assert off < 0.2
