"""Models that read handwritten digits, and hear spoken ones: the smallest honest multimodal runs."""

from dataclasses import replace

from weft.spec.audio import AudioConfig
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
from weft.spec.vision import VisionConfig

_WIDTH = 64
_TEXT = 260  # tokens of the tokenizer; those of encoders follow
_VISION = VisionConfig(
    hidden_size=_WIDTH,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=4 * _WIDTH,
    output_size=_WIDTH,
    projector_size=2 * _WIDTH,
    token=_TEXT,
    start_token=_TEXT + 1,
    end_token=_TEXT + 2,
    patch=2,
    prefix=2,
    max_grid=4,
    frames=0,
    video_grid=4,
    min_patches=16,
    max_patches=16,
)
_AUDIO = AudioConfig(
    hidden_size=_WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=4 * _WIDTH,
    output_size=_WIDTH,
    projector_size=2 * _WIDTH,
    token=_TEXT + 3,
    start_token=_TEXT + 4,
    end_token=_TEXT + 5,
    mels=32,
    subsampling_channels=16,
    conv_norm="rms",
)
_DECODER = HybridConfig(
    pattern="M*EM-",
    vocab_size=272,
    hidden_size=_WIDTH,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=32,
    intermediate_size=4 * _WIDTH,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=_WIDTH,
    moe_shared_expert_intermediate_size=2 * _WIDTH,
    routed_scaling_factor=2.5,
)


def digits_vlm() -> RunConfig:
    """A vision encoder and a hybrid decoder read the 1,797 handwritten digits of scikit-learn."""
    return RunConfig(
        run=RunSettings(name="digits_vlm"),
        model=_DECODER,
        encoders={"vision": _VISION},
        data=DataConfig(
            source="digits", seq_length=120, template="plain", tokenizer=TokenizerConfig(vocab_size=_TEXT)
        ),
        train=TrainConfig(train_iters=300, global_batch_size=24, micro_batch_size=12),
        validation=ValidationConfig(eval_interval=100, eval_iters=4),
        optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-5),
        scheduler=SchedulerConfig(lr_warmup_iters=20),
        checkpoint=CheckpointConfig(load="auto"),
        logger=LoggerConfig(log_interval=25),
    )


def av_tiny() -> RunConfig:
    """Digits seen and spoken, questions on either: two encoders and a decoder, trained together."""
    base = digits_vlm()
    return replace(
        base,
        run=RunSettings(name="av_tiny"),
        encoders={"vision": _VISION, "audio": _AUDIO},
        data=replace(base.data, source="digits_av", seq_length=128),
    )
