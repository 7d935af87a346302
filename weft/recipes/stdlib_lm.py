"""The first run: a Nemotron-3-style hybrid model trained on the running Python's own standard library."""

from weft.spec.data import DataConfig, TokenizerConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.run import (
    LoggerConfig,
    OptimizerConfig,
    RunConfig,
    RunSettings,
    SchedulerConfig,
    TrainConfig,
    ValidationConfig,
)


def stdlib_lm() -> RunConfig:
    """All four layer kinds, LatentMoE and multi-token prediction, in minutes on two CPU cores."""
    vocab = 4096
    model = HybridConfig(
        pattern="MEM*EME-/*E",
        vocab_size=vocab,
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=6,
        mamba_head_dim=64,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=64,
        intermediate_size=768,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        moe_shared_expert_intermediate_size=384,
        moe_latent_size=96,
        routed_scaling_factor=2.5,
    )
    return RunConfig(
        run=RunSettings(name="stdlib_lm"),
        model=model,
        data=DataConfig(source="stdlib", seq_length=512, tokenizer=TokenizerConfig(vocab_size=vocab)),
        train=TrainConfig(train_iters=300, global_batch_size=8, micro_batch_size=8),
        validation=ValidationConfig(eval_interval=100),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-5),
        scheduler=SchedulerConfig(lr_warmup_iters=20, lr_wsd_decay_iters=100),
        logger=LoggerConfig(log_interval=10),
    )
