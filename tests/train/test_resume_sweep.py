"""A run stopped after any of its steps goes on to the same bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.runs import STEPS, small, tensors
from weft.recipes.registry import build
from weft.train.run import train


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["nemotron3_super_pretrain_tiny", "nemotron3_nano_30b_pretrain_tiny"])
def test_resumed_at_every_step(recipe: str, precision: str, tmp_path: Path) -> None:
    config = build(recipe)
    config = replace(config, train=replace(config.train, precision=precision))
    train(small(tmp_path / "whole", config, save_interval=1, most_recent_k=0), {})
    whole = tensors(tmp_path / "whole")
    for stop in range(1, STEPS):
        source = tmp_path / "whole" / "checkpoints" / f"step_{stop:07d}"
        train(small(tmp_path / f"from{stop}", config, load=str(source)), {})
        resumed = tensors(tmp_path / f"from{stop}")
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), stop
