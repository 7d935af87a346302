"""Tensor names, sizes and ``config.json`` of whole omni models: against transformers, and as published."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from weft.models.hf_hybrid import write_config as write_decoder
from weft.models.hf_omni import (
    LIVE,
    PUBLISHED,
    Naming,
    read_config,
    tensor_links,
    unpublishable,
    unread,
    write_config,
)
from weft.models.presets import NEMOTRON3_NANO_30B, NEMOTRON3_NANO_OMNI, NEMOTRON3_NANO_OMNI_TINY
from weft.spec.count import count_parts
from weft.spec.modules import Modules

FULL, TINY = NEMOTRON3_NANO_OMNI, NEMOTRON3_NANO_OMNI_TINY
PREFIXES = {
    "decoder": "language_model.",
    "vision.body": ("vision_model.", "vision_final_layernorm."),
    "vision.projector": ("mlp1.", "multi_modal_projector."),
    "audio.body": ("sound_encoder.encoder.", "audio_tower."),
    "audio.projector": ("sound_projection.", "embed_audio."),
}
# The config.json of Nemotron 3 Nano Omni on the Hub, as far as readers of its sizes quote it.
RELEASED: dict[str, Any] = {
    "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"],
    "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
    "max_sequence_length": 131072,
    "force_image_size": 512,
    "patch_size": 16,
    "downsample_ratio": 0.5,
    "use_thumbnail": True,
    "ps_version": "v2",
    "vit_hidden_size": 1280,
    "projector_hidden_size": 20480,
    "norm_mean": [0.48145466, 0.4578275, 0.40821073],
    "norm_std": [0.26862954, 0.26130258, 0.27577711],
    "video_pruning_rate": 0.7,
    "video_temporal_patch_size": 2,
    "img_context_token_id": 18,
    "video_context_token_id": 131081,
    "sound_context_token_id": 27,
    "vision_config": {
        "version": "c-radio_v4-h",
        "architectures": ["RADIOModel"],
        "patch_size": 16,
        "max_resolution": 2048,
        "preferred_resolution": [768, 768],
        "min_num_patches": 1024,
        "max_num_patches": 13312,
        "video_target_num_patches": 1024,
        "video_temporal_patch_size": 2,
        "separate_video_embedder": True,
        "args": {
            "model": "vit_huge_patch16_224",
            "cpe_max_size": 2048,
            "register_multiple": 10,
            "cls_token_per_teacher": True,
            "min_num_patches": 1024,
            "max_num_patches": 13312,
            "mlp_hidden_size": 1520,
        },
    },
    "sound_config": {
        "model_type": "parakeet",
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
        "conv_kernel_size": 9,
        "convolution_bias": False,
        "subsampling_conv_channels": 256,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "subsampling_factor": 8,
        "num_mel_bins": 128,
        "projection_hidden_size": 4096,
        "projection_bias": False,
        "sampling_rate": 16000,
    },
    "llm_config": write_decoder(NEMOTRON3_NANO_30B),
}


def scaled(made: Modules, **changes: Any) -> Modules:
    """With scales in the layers of vision, as transformers always has them."""
    vision = replace(made.encoders["vision"], layer_scale=True, **changes)
    return replace(made, encoders={**made.encoders, "vision": vision})


def theirs(made: Modules) -> Any:
    """transformers' model, without values."""
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

    with torch.device("meta"):
        return NemotronH_Omni_Reasoning_V3(NemotronH_Omni_Reasoning_V3_Config(**write_config(made)))


MTP = replace(scaled(TINY, final_norm=True), decoder=replace(TINY.decoder, pattern="ME*/*E"))
SILENT = replace(scaled(TINY), encoders={"vision": scaled(TINY).encoders["vision"]})


@pytest.mark.parametrize("naming", [LIVE, PUBLISHED], ids=["live", "published"])
@pytest.mark.parametrize("made", [scaled(FULL), MTP, SILENT], ids=["full size", "mtp", "silent"])
def test_the_table_names_every_tensor(made: Modules, naming: Naming) -> None:
    """Names and shapes of what transformers holds and of what it writes; it has no MTP depths."""
    from transformers.core_model_loading import revert_weight_conversion

    model = theirs(made)
    state = model.state_dict()
    if naming == PUBLISHED:
        state = revert_weight_conversion(model, state)
    want = {name: tuple(tensor.shape) for name, tensor in state.items() if not unread(name)}
    links = [link for link in tensor_links(made, naming) if not link.theirs.startswith("mtp.")]
    assert {link.theirs: link.shape for link in links} == want
    assert len(links) == len(want)
    ours = {link.ours for link in tensor_links(made, naming)}
    assert ours == {spec.name for spec in made.params()}


def test_elements_of_every_part() -> None:
    """As transformers has them at full size, without scales, which C-RADIO has not."""
    state = {n: t for n, t in theirs(FULL).state_dict().items() if not unread(n) and "layer_scale" not in n}
    found = {
        part: sum(tensor.numel() for name, tensor in state.items() if name.startswith(prefix))
        for part, prefix in PREFIXES.items()
    }
    assert count_parts(FULL) == found
    assert found["decoder"] == 31_577_940_288  # as published
    assert sum(found.values()) == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("made", [FULL, TINY, scaled(TINY, pruning=0.7), MTP, SILENT])
def test_config_goes_both_ways(made: Modules) -> None:
    """Also as transformers writes it again, under its own keys."""
    from transformers import NemotronH_Omni_Reasoning_V3_Config

    assert read_config(json.loads(json.dumps(write_config(made)))) == (made, [])
    again = json.loads(NemotronH_Omni_Reasoning_V3_Config(**write_config(made)).to_json_string())
    assert "text_config" in again
    assert "llm_config" not in again
    assert read_config(again) == (made, [])


def test_the_released_config() -> None:
    """It is the preset, which prunes nothing in training."""
    found, problems = read_config(RELEASED)
    assert problems == []
    vision = replace(FULL.encoders["vision"], pruning=0.7)
    assert found == Modules(FULL.decoder, {**FULL.encoders, "vision": vision})


def changed(**changes: Any) -> dict[str, Any]:
    """The released config with other values; ``vision_config__x`` is a key of a section."""
    values = json.loads(json.dumps(RELEASED))
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
    return values


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"downsample_ratio": 0.25}, "downsample_ratio: 0.25 is not supported; it must be 0.5"),
        ({"quantization_config": {}}, "quantization_config: {} is not supported; it must be absent"),
        ({"img_context_token_id": None}, "vision_config.img_context_token_id: is missing"),
        ({"sound_context_token_id": None}, "sound_config.sound_context_token_id: is missing"),
        ({"image_token_id": 19}, "image_token_id: 19, but img_context_token_id is 18; keep one"),
        ({"vit_hidden_size": 768}, "vision_config.hidden_size: 1280, but vit_hidden_size is 768"),
        ({"patch_size": 14}, "vision_config.patch_size: 16, but a copy of it is 14; keep one"),
        ({"vision_config__args__model": "vit_large"}, "vision_config.model: 'vit_large' is not supported"),
        ({"vision_config__use_swiglu_ffn": True}, "vision_config.use_swiglu_ffn: True is not supported"),
        (
            {"vision_config__mlp_ratio": "4"},
            "vision_config.mlp_ratio: expected a number of at least 1, not '4'",
        ),
        ({"vision_config__max_img_size": 2050}, "vision_config.max_img_size: 2050 pixels are not divided"),
        ({"vision_config__num_attention_heads": 7}, "vision_config.num_attention_heads: 7 heads"),
        ({"sound_config__hidden_act": "gelu"}, "sound_config.hidden_act: 'gelu' is not supported"),
        ({"llm_config__use_bias": True}, "llm_config.use_bias: True is not supported"),
        ({"llm_config": None}, "llm_config.hybrid_override_pattern: is missing"),
    ],
)
def test_what_cannot_be_read(changes: dict[str, Any], said: str) -> None:
    _, problems = read_config(changed(**changes))
    assert [str(problem) for problem in problems if str(problem).startswith(said)], problems


def vision_with(**changes: Any) -> Callable[[], Modules]:
    return lambda: scaled(TINY, **changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(TINY, encoders={}), "encoders: none; the published format has one of vision"),
        (
            lambda: replace(TINY, encoders=dict.fromkeys(("a", "b"), TINY.encoders["vision"])),
            "encoders: vision, vision",
        ),
        (vision_with(final_norm=True), "encoders.vision.final_norm: True"),
        (vision_with(frames=0), "encoders.vision.frames: 0, but"),
        (vision_with(projector_eps=1e-6), "encoders.vision.projector_eps: 1e-06"),
        (
            vision_with(hidden_size=14, num_attention_heads=7, intermediate_size=61),
            "encoders.vision.intermediate",
        ),
        (
            lambda: replace(
                TINY, encoders={**TINY.encoders, "audio": replace(TINY.encoders["audio"], conv_norm="rms")}
            ),
            "encoders.audio.conv_norm: 'rms'",
        ),
        (
            lambda: replace(TINY, decoder=replace(TINY.decoder, moe_shared_expert_intermediate_size=0)),
            "model.moe_shared_expert_intermediate_size: 0",
        ),
    ],
)
def test_what_cannot_be_published(make: Callable[[], Modules], said: str) -> None:
    made = make()
    assert any(str(problem).startswith(said) for problem in unpublishable(made)), unpublishable(made)
    with pytest.raises(ValueError, match="published format"):
        write_config(made)
