"""Random plans with complete pairwise coverage: on threads for breadth, on Gloo processes for reality."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import equal, plans

PROCESSES, MOST_PROCESSES, AT_ONCE = 15, 4, 50
ROOT = Path(__file__).parents[2]


def test_every_feasible_pair_is_covered():
    chosen = plans.cases(plans.COUNT)
    covered = set().union(*(plans.pairs(case) for case in chosen))
    assert covered >= plans.all_pairs() - set(plans.infeasible())
    assert not covered & set(plans.infeasible())
    print(plans.report(plans.COUNT))  # noqa: T201 - shown by pytest -s


@pytest.mark.parametrize("first", range(0, plans.COUNT, AT_ONCE))
def test_threads_equal_one_rank(first: int):
    command = [sys.executable, "-W", "error", "-m", "tests.parallel.sweep", str(first), str(first + AT_ONCE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def on_processes(processes, case: plans.Case) -> None:
    arguments = equal.as_arguments(case)
    found = processes(case.ranks).run("tests.parallel.equal:on_processes", arguments, timeout=120)
    assert not any(found), found


@pytest.mark.parametrize("case", plans.cases(PROCESSES, MOST_PROCESSES), ids=str)
def test_processes_equal_one_rank(processes, case):
    on_processes(processes, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", plans.cases(150, MOST_PROCESSES)[PROCESSES:], ids=str)
def test_more_processes_equal_one_rank(processes, case):
    on_processes(processes, case)
