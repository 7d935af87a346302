"""Random plans with complete pairwise coverage: on threads for breadth, on Gloo processes for reality."""

import pytest

from tests.parallel import equal, plans
from weft.parallel.threads import run_threads

THREADS, PROCESSES, MOST_PROCESSES = 200, 15, 4


def test_every_feasible_pair_is_covered():
    chosen = plans.cases(THREADS)
    covered = set().union(*(plans.pairs(case) for case in chosen))
    assert covered >= plans.all_pairs() - set(plans.infeasible())
    assert not covered & set(plans.infeasible())
    print(plans.report(THREADS))  # noqa: T201 - shown by pytest -s


@pytest.mark.parametrize("case", plans.cases(THREADS), ids=str)
def test_threads_equal_one_rank(case):
    found = run_threads(case.ranks, lambda comm: equal.differences(case, comm))
    assert not any(found), found


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
