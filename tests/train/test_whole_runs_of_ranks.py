"""Whole runs of two processes, started as torchrun starts them, equal runs of one."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.runs import STEPS, small, tensors
from weft.config.load import from_yaml, to_yaml
from weft.recipes.registry import build
from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig
from weft.spec.run import RunConfig
from weft.train.metrics import read_rows
from weft.train.run import train

RECIPE = "nemotron3_nano_30b_pretrain_tiny"


def launch(config: RunConfig, where: Path, ranks: int = 2) -> None:
    """``torchrun -m weft train`` without torchrun: one process a rank, and what it sets for each."""
    settings = where / "settings.yaml"
    settings.write_text(to_yaml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "weft", "train", RECIPE, "--config", str(settings)]
    workers = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()


def losses(where: Path) -> list[float]:
    return [row["loss"] for row in read_rows(where / "metrics.jsonl")]


def test_two_processes_equal_one_and_one_goes_on_from_two(tmp_path: Path) -> None:
    """Law 3 of docs/design.md: fp64 to 1e-10, with saves in the background and other numbers of ranks."""
    recipe = build(RECIPE)
    recipe = replace(recipe, train=replace(recipe.train, precision="fp64"))
    alone, two, resumed = (tmp_path / name for name in ("alone", "two", "resumed"))
    train(small(alone, recipe), {})
    launch(small(two, recipe, async_save=True), tmp_path)
    assert len(losses(alone)) == STEPS
    assert losses(two) == pytest.approx(losses(alone), abs=1e-10)
    assert (two / "export").is_dir()
    train(small(resumed, recipe, load=str(two / "checkpoints" / "step_0000003")), {})
    assert losses(resumed) == pytest.approx(losses(alone)[3:], abs=1e-10)
    expected = tensors(alone)
    for name, tensor in [*tensors(two).items(), *tensors(resumed).items()]:
        if not name.startswith("rng/"):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10, msg=name)


LAYOUTS = {
    "tensor and cut store": PlanConfig(
        decoder=LayoutConfig(tp=2, dp=2, store=StoreConfig(level=3, over=("dp",)))
    ),
    "three-dimensional": PlanConfig(decoder=LayoutConfig(tp=2, tp_embed=2, store=StoreConfig(level=1))),
}


@pytest.mark.parametrize("plan", LAYOUTS.values(), ids=list(LAYOUTS))
def test_four_processes_of_a_layout_equal_one(tmp_path: Path, plan: PlanConfig) -> None:
    """Losses, routing and the last checkpoint; then one process goes on from it."""
    recipe = build(RECIPE)
    recipe = replace(recipe, train=replace(recipe.train, precision="fp64"))
    alone, four, resumed = (tmp_path / name for name in ("alone", "four", "resumed"))
    train(small(alone, recipe), {})
    launch(replace(small(four, recipe), plan=plan), tmp_path, ranks=4)
    assert losses(four) == pytest.approx(losses(alone), abs=1e-10)
    hashes = [[row["routing_hash"] for row in read_rows(run / "metrics.jsonl")] for run in (alone, four)]
    assert hashes[0] == hashes[1]
    train(small(resumed, recipe, load=str(four / "checkpoints" / "step_0000003")), {})
    assert losses(resumed) == pytest.approx(losses(alone)[3:], abs=1e-10)
    assert from_yaml(PlanConfig, (four / "plan.yaml").read_text()) == plan
