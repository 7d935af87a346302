"""Tiny siblings speak the same pattern language as the published models."""

import pytest

from weft.models import presets
from weft.spec.count import count
from weft.spec.hybrid import HybridConfig

NAMES = [name for name in vars(presets) if name.isupper() and not name.endswith("_TINY")]


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_are_possible(name: str) -> None:
    assert list(getattr(presets, name).problems()) == []


@pytest.mark.parametrize("name", NAMES)
def test_tiny_sibling(name: str) -> None:
    full: HybridConfig = getattr(presets, name)
    small: HybridConfig = getattr(presets, f"{name}_TINY")
    assert list(small.problems()) == []
    assert set(small.pattern) == set(full.pattern)
    assert small.parts.mtp == full.parts.mtp
    assert small.depths == full.depths
    assert len(small.parts.main) <= 6
    for switch in ("moe_latent_size", "moe_shared_expert_intermediate_size", "mtp_num_depths", "n_group"):
        assert bool(getattr(small, switch)) == bool(getattr(full, switch))
    ratio = full.num_attention_heads // full.num_key_value_heads
    assert small.num_attention_heads == small.num_key_value_heads * min(ratio, 8)
    assert 512 <= small.vocab_size <= 1024
    assert count(small).total < 1_000_000


def test_there_are_six() -> None:
    assert len(NAMES) == 6


def test_tiny_keeps_letters_far_from_attention() -> None:
    model = presets.tiny(HybridConfig(pattern="EMMMMMM*MMMM-", hidden_size=64))
    assert model.pattern == "MMM*ME-"
    assert presets.tiny(HybridConfig(pattern="MMMMMM", hidden_size=64)).pattern == "MM"
