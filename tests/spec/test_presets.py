"""Tiny siblings speak the same pattern language as the published models, and have the same switches."""

from dataclasses import fields

import pytest

from weft.models import presets
from weft.spec.count import count, count_parts
from weft.spec.data import DataConfig
from weft.spec.encoder import EncoderConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.modules import Modules
from weft.spec.run import RunConfig

ALL = {name: value for name, value in vars(presets).items() if name.isupper()}
FULL = {name: value for name, value in ALL.items() if not name.endswith("_TINY")}
NAMES = [name for name, value in FULL.items() if isinstance(value, HybridConfig)]
ENCODERS = [name for name, value in FULL.items() if isinstance(value, EncoderConfig)]
OMNI = [name for name, value in FULL.items() if isinstance(value, Modules)]
SIZES = ("_size", "_layers", "_heads", "token", "patch", "_patches", "_grid", "prefix", "mels", "_channels")


@pytest.mark.parametrize("name", [*NAMES, *ENCODERS])
def test_published_sizes_are_possible(name: str) -> None:
    assert list(getattr(presets, name).problems()) == []


@pytest.mark.parametrize("name", ENCODERS)
def test_tiny_encoder(name: str) -> None:
    """Only sizes differ."""
    full: EncoderConfig = getattr(presets, name)
    small: EncoderConfig = getattr(presets, f"{name}_TINY")
    assert list(small.problems()) == []
    assert type(small) is type(full)
    for name in (field.name for field in fields(full)):
        if not name.endswith(SIZES):
            assert getattr(small, name) == getattr(full, name), name
    assert sum(spec.numel for spec in small.params()) < 100_000


@pytest.mark.parametrize("name", [name for name in ALL if isinstance(ALL[name], Modules)])
def test_modules_fit_together(name: str) -> None:
    """As a run refuses them otherwise."""
    modules: Modules = getattr(presets, name)
    data = DataConfig(source="mock")
    run = RunConfig(model=modules.decoder, encoders=dict(modules.encoders), data=data)
    assert list(run.problems()) == []
    assert run.modules.params() == modules.params()
    tokens = [getattr(e, t) for e in modules.encoders.values() for t in ("token", "start_token", "end_token")]
    given = [token for token in tokens if token >= 0]
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("name", OMNI)
def test_tiny_omni(name: str) -> None:
    full: Modules = getattr(presets, name)
    small: Modules = getattr(presets, f"{name}_TINY")
    assert {n: e.kind for n, e in small.encoders.items()} == {n: e.kind for n, e in full.encoders.items()}
    assert sum(count_parts(small).values()) < 1_000_000


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


def test_every_preset_is_of_a_known_kind() -> None:
    assert (len(NAMES), len(ENCODERS), len(OMNI)) == (6, 2, 1)
    assert len(NAMES) + len(ENCODERS) + len(OMNI) == len(FULL)


def test_tiny_keeps_letters_far_from_attention() -> None:
    model = presets.tiny(HybridConfig(pattern="EMMMMMM*MMMM-", hidden_size=64))
    assert model.pattern == "MMM*ME-"
    assert presets.tiny(HybridConfig(pattern="MMMMMM", hidden_size=64)).pattern == "MM"
