"""Training of the published hybrid models, and of a tiny sibling of each that runs on a laptop.

Data of pretraining is random tokens until ``data.source`` or ``data.blend`` names a real corpus.
"""

from dataclasses import dataclass, replace

from weft.models import presets
from weft.spec.data import DataConfig, TokenizerConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.run import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    RunSettings,
    SchedulerConfig,
    TrainConfig,
    ValidationConfig,
)


@dataclass(frozen=True)
class _Budget:
    """Published training budget; ``tokens``, ``warmup`` and ``decay`` in billions of tokens."""

    tokens: float
    warmup: float
    decay: float
    lr: float
    batch: int = 3072
    seq_length: int = 8192

    def steps(self, billions: float) -> int:
        """Optimizer steps that see so many tokens."""
        return round(billions * 1e9 / (self.batch * self.seq_length))


def _pretrain(name: str, model: HybridConfig, budget: _Budget) -> RunConfig:
    """WSD from the peak rate down to a hundredth of it; AdamW as in all reports of the family."""
    return RunConfig(
        run=RunSettings(name=name),
        model=model,
        data=DataConfig(source="mock", seq_length=budget.seq_length),
        train=TrainConfig(
            train_iters=budget.steps(budget.tokens),
            global_batch_size=budget.batch,
            micro_batch_size=1,
            precision="bf16",
            recompute=True,
        ),
        validation=ValidationConfig(eval_interval=2000, eval_iters=32),
        optimizer=OptimizerConfig(lr=budget.lr, min_lr=budget.lr / 100),
        scheduler=SchedulerConfig(
            lr_warmup_iters=budget.steps(budget.warmup), lr_wsd_decay_iters=budget.steps(budget.decay)
        ),
        checkpoint=CheckpointConfig(save_interval=2000, async_save=True),
    )


def _tiny(full: RunConfig, model: HybridConfig) -> RunConfig:
    """The same run with a tiny model, few short sequences and 50 steps."""
    return replace(
        full,
        run=replace(full.run, name=f"{full.run.name}_tiny"),
        model=model,
        data=replace(full.data, seq_length=128),
        train=TrainConfig(train_iters=50, global_batch_size=8, micro_batch_size=4),
        validation=ValidationConfig(eval_interval=25, eval_iters=2),
        scheduler=SchedulerConfig(lr_warmup_iters=5, lr_wsd_decay_iters=10),
        checkpoint=CheckpointConfig(),
    )


def nemotron_h_8b_pretrain() -> RunConfig:
    """Nemotron-H 8B: 15T tokens (arXiv 2504.03624)."""
    budget = _Budget(tokens=15_000, warmup=8.3, decay=3_600, lr=8e-4, batch=768)
    return _pretrain("nemotron_h_8b_pretrain", presets.NEMOTRON_H_8B, budget)


def nemotron_h_8b_pretrain_tiny() -> RunConfig:
    """Tiny sibling of nemotron_h_8b_pretrain."""
    return _tiny(nemotron_h_8b_pretrain(), presets.NEMOTRON_H_8B_TINY)


def nemotron_nano_9b_v2_pretrain() -> RunConfig:
    """Nemotron Nano 9B v2, with the 20T-token budget of the 12B base it comes from (arXiv 2508.14444)."""
    budget = _Budget(tokens=20_000, warmup=8, decay=3_600, lr=4.5e-4, batch=736)
    return _pretrain("nemotron_nano_9b_v2_pretrain", presets.NEMOTRON_NANO_9B_V2, budget)


def nemotron_nano_9b_v2_pretrain_tiny() -> RunConfig:
    """Tiny sibling of nemotron_nano_9b_v2_pretrain."""
    return _tiny(nemotron_nano_9b_v2_pretrain(), presets.NEMOTRON_NANO_9B_V2_TINY)


def nemotron3_nano_4b_pretrain() -> RunConfig:
    """Nemotron 3 Nano 4B; its budget is not published, the one of Nemotron 3 Nano 30B-A3B stands in."""
    return replace(
        nemotron3_nano_30b_pretrain(),
        run=RunSettings(name="nemotron3_nano_4b_pretrain"),
        model=presets.NEMOTRON3_NANO_4B,
    )


def nemotron3_nano_4b_pretrain_tiny() -> RunConfig:
    """Tiny sibling of nemotron3_nano_4b_pretrain."""
    return _tiny(nemotron3_nano_4b_pretrain(), presets.NEMOTRON3_NANO_4B_TINY)


def nemotron3_nano_30b_pretrain() -> RunConfig:
    """Nemotron 3 Nano 30B-A3B: 25T tokens, decay over the last 5T (arXiv 2512.20856)."""
    budget = _Budget(tokens=25_000, warmup=8.4, decay=5_000, lr=1e-3)
    return _pretrain("nemotron3_nano_30b_pretrain", presets.NEMOTRON3_NANO_30B, budget)


def nemotron3_nano_30b_pretrain_tiny() -> RunConfig:
    """Tiny sibling of nemotron3_nano_30b_pretrain."""
    return _tiny(nemotron3_nano_30b_pretrain(), presets.NEMOTRON3_NANO_30B_TINY)


def nemotron3_super_pretrain() -> RunConfig:
    """Nemotron 3 Super 120B-A12B: 25T tokens, minus-sqrt decay over the last 5T (arXiv 2512.20856)."""
    budget = _Budget(tokens=25_000, warmup=200, decay=5_000, lr=4.5e-4)
    return _pretrain("nemotron3_super_pretrain", presets.NEMOTRON3_SUPER, budget)


def nemotron3_super_pretrain_tiny() -> RunConfig:
    """Tiny sibling of nemotron3_super_pretrain."""
    return _tiny(nemotron3_super_pretrain(), presets.NEMOTRON3_SUPER_TINY)


def nemotron3_ultra_pretrain() -> RunConfig:
    """Nemotron 3 Ultra 550B-A55B: 20T tokens in two phases of 15T and 5T (arXiv 2512.20856)."""
    budget = _Budget(tokens=20_000, warmup=200, decay=5_000, lr=2.5e-4)
    return _pretrain("nemotron3_ultra_pretrain", presets.NEMOTRON3_ULTRA, budget)


def nemotron3_ultra_pretrain_tiny() -> RunConfig:
    """Tiny sibling of nemotron3_ultra_pretrain."""
    return _tiny(nemotron3_ultra_pretrain(), presets.NEMOTRON3_ULTRA_TINY)


def nemotron3_nano_omni_sft() -> RunConfig:
    """Nemotron 3 Nano Omni on pictures, video, sound and text: the first stage, of 16K tokens.

    Set ``data.source`` to a JSONL file with ``messages``, ``data.tokenizer.path`` to the model's tokenizer.
    Where projectors are new, train them alone first: ``train.freeze=[decoder,vision.body,audio.body]``.
    Batch, steps and rates are those published for the text model (arXiv 2512.20856); this one's are not.
    """
    return RunConfig(
        run=RunSettings(name="nemotron3_nano_omni_sft"),
        model=presets.NEMOTRON3_NANO_OMNI.decoder,
        encoders={"vision": presets.CRADIO_V4_H, "audio": presets.PARAKEET_OMNI},
        data=DataConfig(source="messages.jsonl", seq_length=16384, template="chatml"),
        train=TrainConfig(
            train_iters=13_000, global_batch_size=64, micro_batch_size=1, precision="bf16", recompute=True
        ),
        validation=ValidationConfig(eval_interval=500, eval_iters=32),
        optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-7),
        scheduler=SchedulerConfig(lr_decay_style="cosine", lr_warmup_iters=800),
        checkpoint=CheckpointConfig(save_interval=500, async_save=True),
    )


def nemotron3_nano_omni_sft_tiny() -> RunConfig:
    """Tiny sibling of nemotron3_nano_omni_sft: are the digit seen and the digit heard the same?"""
    run = _tiny(nemotron3_nano_omni_sft(), presets.NEMOTRON3_NANO_OMNI_TINY.decoder)
    return replace(
        run,
        encoders=presets.NEMOTRON3_NANO_OMNI_TINY.encoders,
        data=DataConfig(source="digits_av", seq_length=128, tokenizer=TokenizerConfig(vocab_size=320)),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-5),
    )
