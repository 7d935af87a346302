"""The omni recipes are runs of the presets, whose data fits them."""

from dataclasses import replace
from pathlib import Path

import pytest

from weft.data.multimodal import open_multimodal
from weft.models import presets
from weft.recipes.registry import build
from weft.spec.modules import Modules

PAIRS = {
    "nemotron3_nano_omni_sft": presets.NEMOTRON3_NANO_OMNI,
    "nemotron3_nano_omni_sft_tiny": presets.NEMOTRON3_NANO_OMNI_TINY,
}


@pytest.mark.parametrize("name", PAIRS)
def test_modules_are_those_of_the_preset(name: str) -> None:
    assert build(name).modules == PAIRS[name]


@pytest.mark.parametrize("name", PAIRS)
def test_projectors_alone(name: str) -> None:
    """The freeze that the recipe names leaves nothing else to train."""
    run = build(name)
    run = replace(run, train=replace(run.train, freeze=("decoder", "vision.body", "audio.body")))
    assert list(run.problems()) == []
    modules: Modules = run.modules
    trained = {m.full(s.name) for m in modules.all.values() for s in m.params if m.trains(s.name)}
    assert trained == {s.name for s in modules.params() if ".projector." in s.name}


@pytest.mark.slow
def test_the_tiny_run_can_use_every_digit(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    run = build("nemotron3_nano_omni_sft_tiny")
    data = open_multimodal(run.data, run.encoders, run.model.vocab_size, tmp_path)
    assert {name: split.documents for name, split in data.splits.items()} == {"train": 1438, "valid": 359}
    assert not any(split.skipped for split in data.splits.values())
