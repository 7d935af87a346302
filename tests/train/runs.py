"""Whole runs for tests: train, stop, resume."""

from dataclasses import replace
from pathlib import Path

import torch

from weft.checkpoint.load import open_checkpoint
from weft.spec.run import RunConfig
from weft.train.run import train

STEPS = 6


def small(run_dir: Path, config: RunConfig, device: str = "cpu", **checkpoint: object) -> RunConfig:
    """The recipe on mock data, six steps of two microbatches, in ``run_dir``."""
    return replace(
        config,
        run=replace(config.run, dir=str(run_dir), device=device, threads=1),
        data=replace(
            config.data,
            source="mock",
            blend="",
            seq_length=32,
            mock_tokens=32_768,
            cache=str(run_dir.parent / "cache"),
        ),
        train=replace(config.train, train_iters=STEPS, global_batch_size=4, micro_batch_size=2),
        scheduler=replace(config.scheduler, lr_warmup_iters=1, lr_wsd_decay_iters=2),
        validation=replace(config.validation, eval_interval=0),
        logger=replace(config.logger, peak_flops=1e9),
        checkpoint=replace(config.checkpoint, save=True, **{"save_interval": 3, "load": "", **checkpoint}),
    )


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    checkpoint = open_checkpoint(run_dir)
    assert checkpoint.step == STEPS
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def bits_after(run_dir: Path, config: RunConfig, device: str, stop: int | None) -> dict[str, torch.Tensor]:
    """All tensors after six steps, uninterrupted or resumed from the checkpoint of step ``stop``."""
    train(small(run_dir, config, device), {})
    if stop is None:
        return tensors(run_dir)
    again = run_dir.with_name(f"{run_dir.name}-resumed")
    source = run_dir / "checkpoints" / f"step_{stop:07d}"
    train(small(again, config, device, load=str(source)), {})
    return tensors(again)
