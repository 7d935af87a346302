"""Encoders and decoder, each with its own layout and ranks: two steps equal those of one process."""

from typing import Any

import pytest

from tests.parallel.mixed import differences
from tests.parallel.mixed_plans import CLASSES, PROCESSES, Mixed, drawn
from weft.parallel.comm import Comm
from weft.parallel.threads import run_threads
from weft.plan.check import check_run

PART, RANDOM = 5, 20


def differing(case: Mixed) -> list[str]:
    config = case.config()
    assert not check_run(config, case.ranks)
    found = run_threads(case.ranks, lambda comm: differences(config, comm), 120)
    return [f"rank {rank}: {text}" for rank, texts in enumerate(found) for text in texts]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_configurations_equal_one_process(name: str) -> None:
    assert not differing(CLASSES[name])


@pytest.mark.parametrize("first", range(0, RANDOM, PART))
def test_random_plans_equal_one_process(first: int) -> None:
    for seed in range(first, first + PART):
        case = drawn(seed)
        assert not (found := differing(case)), (seed, case, found[:4])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(RANDOM, 400, PART))
def test_more_random_plans_equal_one_process(first: int) -> None:
    for seed in range(first, first + PART):
        case = drawn(seed)
        assert not (found := differing(case)), (seed, case, found[:4])


def on_processes(comm: Comm, name: str) -> list[str]:
    return differences(CLASSES[name].config(), comm)


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_equal_one(name: str, processes: Any) -> None:
    found = processes(CLASSES[name].ranks).run("tests.parallel.test_mixed:on_processes", {"name": name})
    assert not [text for texts in found for text in texts]
