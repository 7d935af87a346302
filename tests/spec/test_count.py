"""Counts from the spec: published sizes exactly, arithmetic and bytes against slow twins."""

import math
from dataclasses import replace

import pytest

from weft.models import presets
from weft.spec.count import Counts, count, mean_context, state_bytes, training_flops_per_token
from weft.spec.hybrid import HybridConfig
from weft.spec.layers import AttentionConfig, MambaConfig, MLPConfig, MoEConfig

# Elements of the published checkpoints (main stack, MTP).
PUBLISHED = {
    "NEMOTRON_H_8B": (8_100_852_736, 0),
    "NEMOTRON_NANO_9B_V2": (8_888_227_328, 0),
    "NEMOTRON3_NANO_4B": (3_973_556_832, 0),
    "NEMOTRON3_NANO_30B": (31_577_940_288, 0),
    "NEMOTRON3_SUPER": (120_668_707_840, 2_942_325_248),
    "NEMOTRON3_ULTRA": (549_308_993_536, 11_215_610_368),
}
# Active billions with both embeddings, as published with two decimals or one.
ACTIVE = {"NEMOTRON3_NANO_30B": (3.58, 2), "NEMOTRON3_SUPER": (12.77, 2), "NEMOTRON3_ULTRA": (56.1, 1)}
TINY = HybridConfig(
    pattern="ME*-/*E",
    vocab_size=11,
    hidden_size=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    mamba_num_heads=4,
    mamba_head_dim=3,
    ssm_state_size=5,
    n_groups=2,
    chunk_size=16,
    intermediate_size=6,
    n_routed_experts=7,
    num_experts_per_tok=2,
    moe_intermediate_size=9,
    moe_shared_expert_intermediate_size=10,
    moe_latent_size=3,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    counts = count(getattr(presets, name))
    assert (counts.main, counts.mtp) == PUBLISHED[name]
    assert counts.total == sum(PUBLISHED[name])


def test_super_is_as_large_as_its_card_says() -> None:
    assert count(presets.NEMOTRON3_SUPER).total == 123_611_033_088


@pytest.mark.parametrize("name", PUBLISHED)
def test_active(name: str) -> None:
    counts = count(getattr(presets, name))
    if name not in ACTIVE:
        assert counts.active == counts.main
    else:
        billions, digits = ACTIVE[name]
        assert round(counts.active / 1e9, digits) == billions


def test_counts_of_a_tiny_model_by_hand() -> None:
    h, vocab = 8, 11
    inner, conv = 12, 12 + 2 * 2 * 5
    mamba = h * (inner + conv + 4) + 5 * conv + 3 * 4 + inner + inner * h + h
    attention = h * 4 * (4 + 2 * 2) + 4 * 4 * h + h
    mlp = 2 * h * 6 + h
    expert = 2 * 3 * 9
    moe = 7 * expert + h * 7 + 7 + 2 * h * 10 + 2 * h * 3 + h
    depth = attention + moe + 2 * h * h + 3 * h
    main = 2 * vocab * h + h + mamba + attention + mlp + moe
    assert count(TINY) == Counts(main, depth, main - 5 * expert, depth - 5 * expert)


def test_tied_embeddings_count_once() -> None:
    tied = replace(TINY, tie_word_embeddings=True)
    assert count(TINY).main - count(tied).main == 11 * 8


def test_names_are_unique() -> None:
    names = [spec.name for spec in presets.NEMOTRON3_SUPER.params()]
    assert len(names) == len(set(names))


def test_mean_context() -> None:
    assert mean_context((4,)) == (1 + 2 + 3 + 4) / 4
    assert mean_context((1, 3)) == (1 + 1 + 2 + 3) / 4


def slow_forward(config: HybridConfig, context: float) -> float:
    """Forward FLOPs of one token, from the matrix products of each layer."""

    def layer(mixer) -> float:
        match mixer:
            case MambaConfig():
                n, inner, groups = mixer.state, mixer.inner, mixer.groups
                rows = 2 * inner + 2 * groups * n + mixer.heads
                scan = mixer.chunk * (groups * n + inner) + 4 * inner * n
                return 2 * mixer.embed * (rows + inner) + 2 * mixer.conv * (inner + 2 * groups * n) + scan
            case AttentionConfig():
                q, kv, d = mixer.heads, mixer.kv_heads, mixer.head_dim
                return 2 * mixer.embed * d * (2 * q + 2 * kv) + 4 * context * q * d
            case MLPConfig():
                return 4 * mixer.embed * mixer.mlp
            case MoEConfig():
                chosen = mixer.router.top_k * 4 * mixer.width * mixer.mlp
                sides = 4 * mixer.embed * (mixer.shared_mlp + mixer.latent) + 2 * mixer.embed * mixer.experts
                return chosen + sides
        raise AssertionError(mixer)

    head = 2 * config.vocab_size * config.hidden_size
    total = head + sum(layer(config.mixer(s)) for s in config.parts.main)
    for depth in range(config.depths):
        inner = config.parts.mtp[min(depth, len(config.parts.mtp) - 1)]
        total += head + 4 * config.hidden_size**2 + sum(layer(config.mixer(s)) for s in inner)
    return total


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "ME*-/*E", "MM*E/E"])
def test_flops(pattern: str, depths: int) -> None:
    config = replace(TINY, pattern=pattern, mtp_num_depths=depths if "/" in pattern else 0)
    got = training_flops_per_token(config, 10.5)
    assert math.isclose(got, 3 * slow_forward(config, 10.5), rel_tol=1e-12)


def test_dense_rule_of_thumb() -> None:
    """About 6 FLOPs per parameter of the products where scan and attention are small."""
    model = replace(TINY, pattern="-" * 6, hidden_size=64, intermediate_size=256, vocab_size=32)
    products = count(model).main - 32 * 64 - 7 * 64
    assert training_flops_per_token(model, 1.0) == 6 * products


@pytest.mark.parametrize(("precision", "each"), [("fp64", 32), ("fp32", 16), ("bf16", 18)])
def test_state_bytes(precision: str, each: int) -> None:
    specs = TINY.params()
    buffers = sum(spec.numel for spec in specs if spec.buffer)
    fp32 = sum(spec.numel for spec in specs if spec.fp32 and not spec.buffer)
    usual = count(TINY).total - buffers - fp32
    kept = 32 if precision == "fp64" else 16  # fp32 parameters are their own master copy
    weight = 8 if precision == "fp64" else 4
    assert state_bytes(TINY, precision) == usual * each + fp32 * kept + buffers * weight
