"""Published sizes, each with a tiny sibling: hybrid decoders, encoders of items, and both together.

Torch-free: recipes read it before torch is imported.
"""

from dataclasses import replace

from weft.spec.audio import AudioConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.modules import Modules
from weft.spec.vision import VisionConfig

NEMOTRON_H_8B = HybridConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    hidden_size=4096,
    intermediate_size=21504,
    num_attention_heads=32,
    num_key_value_heads=8,
    mamba_num_heads=128,
    mamba_head_dim=64,
    n_groups=8,
    max_position_embeddings=8192,
)

NEMOTRON_NANO_9B_V2 = HybridConfig(
    pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    hidden_size=4480,
    intermediate_size=15680,
    num_attention_heads=40,
    num_key_value_heads=8,
    mamba_num_heads=128,
    mamba_head_dim=80,
    n_groups=8,
    max_position_embeddings=131072,
)

NEMOTRON3_NANO_4B = HybridConfig(
    pattern="M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    hidden_size=3136,
    intermediate_size=12544,
    num_attention_heads=40,
    num_key_value_heads=8,
    mamba_num_heads=96,
    mamba_head_dim=80,
    n_groups=8,
    chunk_size=256,
)

NEMOTRON3_NANO_30B = HybridConfig(
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688,
    num_attention_heads=32,
    num_key_value_heads=2,
    mamba_num_heads=64,
    mamba_head_dim=64,
    n_groups=8,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
    initializer_range=0.0173,
)

NEMOTRON3_SUPER = HybridConfig(
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME/*E",
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=2,
    mamba_num_heads=128,
    mamba_head_dim=64,
    n_groups=8,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_latent_size=1024,
    moe_shared_expert_intermediate_size=5376,
    routed_scaling_factor=5.0,
    initializer_range=0.014,
    mtp_num_depths=2,
    mtp_loss_scale=0.3,
)

NEMOTRON3_ULTRA = HybridConfig(
    pattern=(
        "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
        "EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME/*E"
    ),
    hidden_size=8192,
    num_attention_heads=64,
    num_key_value_heads=2,
    mamba_num_heads=256,
    mamba_head_dim=64,
    n_groups=8,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=5120,
    moe_latent_size=2048,
    moe_shared_expert_intermediate_size=10240,
    routed_scaling_factor=5.0,
    initializer_range=0.0099,
    mtp_num_depths=2,
    mtp_loss_scale=0.1,
    max_position_embeddings=1048576,
)


def tiny(config: HybridConfig) -> HybridConfig:
    """A model of the same kinds of layers and ratios, of which a CPU makes a step in a fraction of a second.

    The pattern is the neighbourhood of the first attention layer, and every MTP part whole. Query heads per
    key/value head stay (at most 8), as do latent, shared and repeated parts where the original has them.
    """
    hidden = 64

    def scaled(width: int) -> int:
        return width * hidden // config.hidden_size

    parts = config.parts
    middle = max(parts.main.find("*"), 0)
    near = parts.main[max(0, middle - 3) : middle + 2]
    missing = "".join(dict.fromkeys(letter for letter in parts.main if letter not in near))
    kv_heads = min(config.num_key_value_heads, 2)
    ratio = config.num_attention_heads // config.num_key_value_heads
    return replace(
        config,
        pattern="/".join([near + missing, *parts.mtp]),
        vocab_size=512,
        hidden_size=hidden,
        num_attention_heads=kv_heads * min(ratio, 8),
        num_key_value_heads=kv_heads,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=config.mamba_head_dim // 4,
        ssm_state_size=16,
        n_groups=min(config.n_groups, 2),
        chunk_size=32,
        intermediate_size=max(1, scaled(config.intermediate_size)),
        n_routed_experts=min(config.n_routed_experts, 16),
        num_experts_per_tok=min(config.num_experts_per_tok, 4),
        moe_intermediate_size=max(1, scaled(config.moe_intermediate_size)),
        moe_shared_expert_intermediate_size=scaled(config.moe_shared_expert_intermediate_size),
        moe_latent_size=scaled(config.moe_latent_size),
    )


NEMOTRON_H_8B_TINY = tiny(NEMOTRON_H_8B)
NEMOTRON_NANO_9B_V2_TINY = tiny(NEMOTRON_NANO_9B_V2)
NEMOTRON3_NANO_4B_TINY = tiny(NEMOTRON3_NANO_4B)
NEMOTRON3_NANO_30B_TINY = tiny(NEMOTRON3_NANO_30B)
NEMOTRON3_SUPER_TINY = tiny(NEMOTRON3_SUPER)
NEMOTRON3_ULTRA_TINY = tiny(NEMOTRON3_ULTRA)

# The vision encoder of Nemotron 3 Nano Omni: C-RADIOv4-H, and the projector to that decoder.
CRADIO_V4_H = VisionConfig(
    hidden_size=1280,
    num_hidden_layers=32,
    num_attention_heads=16,
    intermediate_size=5120,
    output_size=2688,
    projector_size=20480,
    token=18,
    start_token=21,
    end_token=22,
)

CRADIO_V4_H_TINY = VisionConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    patch=4,
    prefix=3,
    max_grid=8,
    min_patches=4,
    max_patches=64,
    video_grid=4,
    output_size=64,
    projector_size=128,
    token=18,
    start_token=21,
    end_token=22,
)

# The sound encoder of Nemotron 3 Nano Omni: Parakeet's FastConformer, and the projector to that decoder.
PARAKEET_OMNI = AudioConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=8,
    intermediate_size=4096,
    output_size=2688,
    projector_size=4096,
    conv_bias=False,
    token=27,
)

PARAKEET_OMNI_TINY = replace(
    PARAKEET_OMNI,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    output_size=64,
    projector_size=48,
    mels=16,
    subsampling_channels=8,
)

# Nemotron 3 Nano Omni. Its rows of a video take the places of picture tokens.
NEMOTRON3_NANO_OMNI = Modules(NEMOTRON3_NANO_30B, {"vision": CRADIO_V4_H, "audio": PARAKEET_OMNI})
NEMOTRON3_NANO_OMNI_TINY = Modules(
    NEMOTRON3_NANO_30B_TINY,
    {  # tokens above those of any tokenizer that a tiny run trains
        "vision": replace(CRADIO_V4_H_TINY, token=508, start_token=509, end_token=510),
        "audio": replace(PARAKEET_OMNI_TINY, token=511),
    },
)
