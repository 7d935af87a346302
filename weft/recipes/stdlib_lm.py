"""The first run: a Nemotron-3-style hybrid model trained on the running Python's own standard library."""

from weft.spec.data import DataConfig, TokenizerConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.run import (
    CheckpointConfig,
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
    vocab = 2048
    model = HybridConfig(
        pattern="ME*EM-/*E",
        vocab_size=vocab,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=4,
        mamba_head_dim=64,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=64,
        intermediate_size=512,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=256,
        moe_latent_size=64,
        routed_scaling_factor=2.5,
    )
    tokenizer = TokenizerConfig(vocab_size=vocab)
    return RunConfig(
        run=RunSettings(name="stdlib_lm"),
        model=model,
        data=DataConfig(source="stdlib", seq_length=512, valid_fraction=0.05, tokenizer=tokenizer),
        train=TrainConfig(train_iters=900, global_batch_size=4, micro_batch_size=4),
        validation=ValidationConfig(eval_interval=100, eval_iters=8),
        optimizer=OptimizerConfig(lr=5e-3, min_lr=5e-5),
        scheduler=SchedulerConfig(lr_warmup_iters=30, lr_wsd_decay_iters=0),
        checkpoint=CheckpointConfig(load="auto", save_interval=300),
        logger=LoggerConfig(log_interval=25),
    )
