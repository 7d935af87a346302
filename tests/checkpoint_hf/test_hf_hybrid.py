"""The key table and ``config.json`` of the hybrid family, against what is published."""

import json
import math
from dataclasses import replace

import pytest

from tests.checkpoint_hf.hf_cases import CASES
from tests.tiny import CONFIG
from weft.models import presets
from weft.models.hf_hybrid import (
    FIELDS,
    LIVE,
    PUBLISHED,
    describes,
    read_config,
    tensor_links,
    unpublishable,
    without_mtp,
    write_config,
)
from weft.spec.hybrid import HybridConfig

ALL = {name: value for name, value in vars(presets).items() if isinstance(value, HybridConfig)}


@pytest.mark.parametrize("naming", [PUBLISHED, LIVE], ids=["published", "live"])
@pytest.mark.parametrize("name", [*CASES, *(n for n in ALL if n.endswith("TINY"))])
def test_links_hold_every_element_once(name: str, naming) -> None:
    config = CASES.get(name) or ALL[name]
    links = tensor_links(config, naming)
    assert len({link.theirs for link in links}) == len(links)
    own = [link for link in links if not link.copy]
    for spec in config.params():
        mine = [link for link in own if link.ours == spec.name]
        assert sum(math.prod(link.size) for link in mine) == spec.numel
        rows = 0  # links of one tensor are its rows in order: what streaming stands on
        for link in mine:
            assert link.start == (rows, *(0 for _ in spec.shape[1:]))
            assert link.size[1:] == spec.shape[1:]
            assert math.prod(link.shape) == math.prod(link.size)
            rows += link.size[0]
        assert rows == spec.shape[0]


def test_published_counts() -> None:
    """Of the model cards: tensors and elements of Super (with MTP) and Nano 4B."""
    links = tensor_links(presets.NEMOTRON3_SUPER)
    assert len(links) == 42_683
    assert sum(math.prod(link.shape) for link in links) == 123_611_033_088
    assert sum(link.theirs.endswith("e_score_correction_bias") for link in links) == 41
    links = tensor_links(presets.NEMOTRON3_NANO_4B)
    assert len(links) == 263
    assert sum(math.prod(link.shape) for link in links) == 3_973_556_832


def test_names_of_one_layer_of_each_kind() -> None:
    config = replace(CONFIG, pattern="M*-E/*E/*E", n_routed_experts=4, mtp_num_depths=0)
    shapes = {link.theirs: link.shape for link in tensor_links(config)}
    layer = "backbone.layers."
    assert shapes[f"{layer}0.mixer.conv1d.weight"] == (64, 1, 4)
    assert shapes[f"{layer}0.mixer.in_proj.weight"] == (100, 16)
    assert shapes[f"{layer}1.mixer.q_proj.weight"] == (32, 16)
    assert shapes[f"{layer}1.mixer.k_proj.weight"] == shapes[f"{layer}1.mixer.v_proj.weight"] == (16, 16)
    assert shapes[f"{layer}2.mixer.up_proj.weight"] == (24, 16)
    assert shapes[f"{layer}3.mixer.experts.3.down_proj.weight"] == (8, 12)
    assert shapes[f"{layer}3.mixer.gate.e_score_correction_bias"] == (4,)
    mtp = {name for name in shapes if name.startswith("mtp.") and "mixer" not in name}
    first = {f"mtp.layers.{i}.{name}.weight" for i in (0, 2) for name in ("enorm", "hnorm", "eh_proj")}
    last = {f"mtp.layers.{i}.final_layernorm.weight" for i in (1, 3)}
    assert mtp == first | last | {f"mtp.layers.{i}.norm.weight" for i in range(4)}
    assert shapes["mtp.layers.3.mixer.fc1_latent_proj.weight"] == (8, 16)


@pytest.mark.parametrize("name", [*CASES, *ALL])
def test_config_round_trip(name: str) -> None:
    config = CASES.get(name) or ALL[name]
    written = json.loads(json.dumps(write_config(config), allow_nan=False))
    found, problems = read_config(written)
    assert not problems
    assert found is not None
    assert write_config(found) == write_config(config)
    assert found.params() == config.params()
    assert describes(written, config)
    assert describes(written, without_mtp(config))
    assert not describes(written, replace(config, vocab_size=7))


def test_both_spellings_of_the_layers() -> None:
    old = write_config(CONFIG)
    new = {key: value for key, value in old.items() if "pattern" not in key and key != "num_hidden_layers"}
    new["layers_block_type"] = ["linear_attention", "moe", "full_attention", "mlp"]
    new["mtp_layers_block_type"] = ["attention", "moe"]
    new["time_step_limit"] = [0.0, {"__float__": "Infinity"}]  # as transformers 5 writes infinity
    assert read_config(new) == read_config(old)
    assert read_config(old)[0] is not None


def test_absent_keys_take_the_values_of_transformers() -> None:
    config, problems = read_config({"hybrid_override_pattern": "M*E-", "num_nextn_predict_layers": 1})
    assert not problems
    assert config is not None
    assert config.pattern == "M*E-/*E"
    assert config.head_dim == 128
    assert config.n_groups == 8
    assert set(FIELDS) <= set(vars(config))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attention_head_dim": 8, "head_dim": None}, {"head_dim": 8}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"moe_latent_size": None}, {"moe_latent_size": 0}),
        ({"routed_scaling_factor": 5}, {"routed_scaling_factor": 5.0}),
        ({"time_step_limit": [0.01, 0.5]}, {"time_step_limit": (0.01, 0.5)}),
        ({"norm_eps": 1e-6, "layer_norm_epsilon": None}, {"layer_norm_epsilon": 1e-6}),
    ],
)
def test_older_keys(changes: dict, expected: dict) -> None:
    config, problems = read_config(write_config(CONFIG) | changes)
    assert not problems
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias: True is not supported; it must be False"),
        ({"mlp_hidden_act": "silu"}, "it must be 'relu2'"),
        ({"n_shared_experts": 2}, "it must be 1"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "it must be absent"),
        ({"hybrid_override_pattern": "MXE"}, "unknown letter 'X'"),
        ({"hybrid_override_pattern": "ME/E"}, "MTP layers have a key of their own"),
        ({"hybrid_override_pattern": 7}, "expected letters"),
        ({"hybrid_override_pattern": None}, "is missing"),
        ({"layers_block_type": ["mamba", "moe"]}, "keys name different layers"),
        ({"layers_block_type": ["mamba", "conv"]}, "expected a list of mamba"),
        ({"num_hidden_layers": 9}, "names 4 layers"),
        ({"num_nextn_predict_layers": -1}, "expected a whole number"),
        ({"num_experts_per_tok": 99}, "there are only 8 experts"),
        ({"hidden_size": "16"}, "expected a whole number"),
        ({"norm_eps": 1e-3}, "keep one"),
        ({"time_step_limit": [0.0]}, "expected 2 values"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    _, problems = read_config(write_config(CONFIG) | changes)
    assert any(message in str(problem) for problem in problems), problems


def test_all_problems_at_once() -> None:
    _, problems = read_config(
        write_config(CONFIG) | {"use_bias": True, "n_groups": 0, "num_hidden_layers": 1}
    )
    assert {problem.path for problem in problems} == {"use_bias", "n_groups", "num_hidden_layers"}


def test_what_the_format_cannot_say() -> None:
    assert "shared expert" in str(unpublishable(replace(CONFIG, moe_shared_expert_intermediate_size=0))[0])
    assert not unpublishable(CONFIG)
