"""A model from a checkpoint, and the tokenizer that lies beside it."""

from pathlib import Path
from typing import Any

import torch

from weft.build.model import assemble_from
from weft.checkpoint.load import Checkpoint, match, open_checkpoint
from weft.config.errors import CheckpointError
from weft.config.load import from_dict
from weft.config.text import parse
from weft.models.hybrid import HybridLM
from weft.spec.hybrid import HybridConfig


def model_config(checkpoint: Checkpoint) -> HybridConfig:
    """The model section of the run that wrote a checkpoint.

    Raises:
        CheckpointError: the checkpoint names no model.
    """
    held = _section(checkpoint, "model")
    if not isinstance(held, dict):
        raise CheckpointError(
            f"{checkpoint.path}: its manifest describes no model; it was not written by weft"
        )
    return from_dict(HybridConfig, held)


def encoders_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the encoders that the run had which wrote a checkpoint."""
    return tuple(_section(checkpoint, "encoders") or ())


def _section(checkpoint: Checkpoint, name: str) -> Any:
    """A section of the run's settings as plain values; None if it is not there."""
    text = checkpoint.meta.get("config")
    return parse(text, f"{checkpoint.path}: config").values.get(name) if isinstance(text, str) else None


def load_model(
    path: Path, precision: str = "fp32", device: torch.device | None = None
) -> tuple[HybridLM, HybridConfig]:
    """The model of a run, checkpoints or step directory; of a multimodal one its decoder.

    Raises:
        CheckpointError: nothing committed there, damage, or tensors that do not fit its config.
    """
    checkpoint = open_checkpoint(path)
    config = model_config(checkpoint)
    match(checkpoint, config.params(), "model/", encoders_of(checkpoint))
    where = device or torch.device("cpu")
    return assemble_from(
        config, precision, where, lambda name, box: checkpoint.read(f"model/{name}", box)
    ), config


def run_of(path: Path) -> Path:
    """The run directory that a run, checkpoints or step directory belongs to."""
    step = open_checkpoint(path).path
    return step.parent.parent if step.parent.name == "checkpoints" else step.parent
