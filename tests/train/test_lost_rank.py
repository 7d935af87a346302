"""A run that loses a rank says so, ends, and goes on from its last checkpoint on fewer ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.runs import small
from weft.config.load import to_yaml
from weft.recipes.registry import build
from weft.spec.run import RunConfig
from weft.train.metrics import read_rows
from weft.train.run import train

RECIPE = "nemotron3_nano_30b_pretrain_tiny"
STEPS, FAULT = 30, 8  # of the whole run; rows that are there when the rank is lost


def long(where: Path, **checkpoint: object) -> RunConfig:
    recipe = build(RECIPE)
    recipe = replace(recipe, train=replace(recipe.train, precision="fp64"))
    config = small(where, recipe, **checkpoint)
    config = replace(config, train=replace(config.train, train_iters=STEPS))
    return replace(config, run=replace(config.run, watchdog=4.0))


def worker_of(launcher: int, rank: int) -> int:
    """The process of a rank of torchrun."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no process is rank {rank}")


def rows(where: Path) -> dict[int, float]:
    path = where / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in read_rows(path)} if path.exists() else {}


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "sign"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_run_that_lost_a_rank_goes_on_with_one(tmp_path: Path, rank: int, sign: int) -> None:
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    settings = tmp_path / "settings.yaml"
    settings.write_text(to_yaml(long(broken)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "weft", "train", RECIPE, "--config", str(settings)]
    output = tmp_path / "output.txt"
    with (
        output.open("w") as file,
        subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
        ) as process,
    ):
        try:
            until = time.monotonic() + 90
            while len(rows(broken)) < FAULT:
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < until, output.read_text()
                time.sleep(0.01)
            os.kill(worker_of(process.pid, rank), sign)
            assert process.wait(30) != 0
        finally:
            process.kill()
    lost = rf"weft: rank {1 - rank} at step \d+ in .*: rank {rank} .* at step \d+ in"
    assert re.search(lost, output.read_text()), output.read_text()
    assert output.read_text().count("Traceback") == 1  # torchrun's

    train(long(broken, load="auto"), {})
    train(long(alone), {})
    assert len(rows(broken)) == STEPS
    assert rows(broken) == pytest.approx(rows(alone), rel=1e-9)
