"""Encoders and decoder, each with its own layout and ranks: two steps equal those of one process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.mixed import differences
from tests.parallel.mixed_plans import CLASSES, PROCESSES
from weft.parallel.comm import Comm
from weft.parallel.threads import run_threads

ROOT = Path(__file__).parents[2]
AT_ONCE, RANDOM, MORE = 20, 40, 400


def sweep(*words: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.parallel.mixed_sweep", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_classes_of_configurations_equal_one_process() -> None:
    sweep("classes")


@pytest.mark.parametrize("first", range(0, RANDOM, AT_ONCE))
def test_random_plans_equal_one_process(first: int) -> None:
    sweep(str(first), str(first + AT_ONCE))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(RANDOM, MORE, AT_ONCE))
def test_more_random_plans_equal_one_process(first: int) -> None:
    sweep(str(first), str(first + AT_ONCE))


def test_annotations_hold() -> None:
    """One plan under the type checks of every call."""
    case = CLASSES["partly overlapping"]
    config = case.config()
    assert not any(run_threads(case.ranks, lambda comm: differences(config, comm), 120))


def on_processes(comm: Comm, name: str) -> list[str]:
    return differences(CLASSES[name].config(), comm)


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_equal_one(name: str, processes: Any) -> None:
    arguments = {"name": name}
    found = processes(CLASSES[name].ranks).run(
        "tests.parallel.test_mixed:on_processes", arguments, timeout=120
    )
    assert not [text for texts in found for text in texts]
