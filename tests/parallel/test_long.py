"""Many steps: fp64 stays within rounding of one process, fp32 until the first routing flip."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.long import PLANS

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.parallel.long", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_200_steps_in_fp64(name: str) -> None:
    run(name, "fp64", "200")


@pytest.mark.parametrize("name", PLANS)
def test_fp32_until_a_routing_flip(name: str) -> None:
    run(name, "fp32", "10")
