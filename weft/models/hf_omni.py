"""Omni models (Nemotron 3 Nano Omni) as published: tensor names and ``config.json`` of decoder and encoders.

Each module keeps the table of its own file; here are the prefixes of the decoder, and the keys around the
sections. transformers calls the same keys by other names, which are read too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from weft.config.errors import Problem
from weft.config.load import read, to_dict
from weft.models import hf_audio, hf_hybrid, hf_vision
from weft.models.hf_table import Link
from weft.spec.audio import AudioConfig
from weft.spec.encoder import EncoderConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.modules import Modules
from weft.spec.vision import VisionConfig

MODEL_TYPE = "nemotron_h_omni"
MODEL_TYPES = (
    MODEL_TYPE,
    "NemotronH_Nano_Omni_Reasoning_V3",
    "NemotronH_Super_Omni_Reasoning_V3",
)
"""Of files that may be read: transformers' own, and those of files on the Hub."""
LANGUAGE, MTP = "language_model.", "mtp."
"""Prefix of all tensors of the decoder, apart from those of MTP depths."""


@dataclass(frozen=True)
class Naming:
    """One way to name a whole model."""

    decoder: hf_hybrid.Naming
    vision: str
    audio: hf_audio.Naming


PUBLISHED = Naming(hf_hybrid.PUBLISHED, hf_vision.PUBLISHED, hf_audio.PUBLISHED)
LIVE = Naming(hf_hybrid.LIVE, hf_vision.LIVE, hf_audio.LIVE)


def tensor_links(modules: Modules, naming: Naming = PUBLISHED) -> tuple[Link, ...]:
    """Every published tensor of a model; ours have the names of ``Modules.params``."""
    found = [
        link if link.theirs.startswith(MTP) else replace(link, theirs=LANGUAGE + link.theirs)
        for link in hf_hybrid.tensor_links(modules.decoder, naming.decoder)
    ]
    for name, encoder in modules.encoders.items():
        links = _encoder_links(encoder, naming)
        found += [replace(link, ours=f"{name}.{link.ours}") for link in links]
    return tuple(found)


def _encoder_links(encoder: EncoderConfig, naming: Naming) -> tuple[Link, ...]:
    match encoder:
        case VisionConfig():
            return hf_vision.tensor_links(encoder, naming.vision)
        case AudioConfig():
            return hf_audio.tensor_links(encoder, naming.audio)
        case _:
            raise TypeError(f"no table of names for a {type(encoder).__name__}")


def unread(name: str) -> bool:
    """Whether a published tensor holds nothing that a model is made of (statistics of pixels, counters)."""
    return name in hf_vision.CONSTANTS or any(part in name for part in hf_audio.UNUSED)


# Keys around the sections: as published, and as transformers calls them.
LLM, PICTURES, SOUND = "llm_config", "vision_config", "sound_config"
PICTURE_TOKEN, SOUND_TOKEN, WIDTH = "img_context_token_id", "sound_context_token_id", "vit_hidden_size"
ALIASES = {
    LLM: "text_config",
    SOUND: "audio_config",
    PICTURE_TOKEN: "image_token_id",
    SOUND_TOKEN: "audio_token_id",
    WIDTH: "vision_hidden_size",
}
# Keys of which we know only one value: around the sections, of the section of vision, and of ``args`` in it,
# which are those of the training of RADIO: where a published file gives no sizes, they do.
FIXED: dict[str, Any] = {"downsample_ratio": 0.5, "ps_version": "v2", "quantization_config": None}
FIXED_VISION: dict[str, Any] = {
    "hidden_act": "gelu",
    "use_swiglu_ffn": False,
    "separate_video_embedder": True,
}
FIXED_ARGS: dict[str, Any] = {
    "model": "vit_huge_patch16_224",
    "cpe_max_size": 2048,
    "register_multiple": 10,
    "cls_token_per_teacher": True,
}
# Keys of the section of vision, our settings, and what transformers takes where a key is absent.
FIELDS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 1280),
    "num_hidden_layers": ("num_hidden_layers", 32),
    "num_attention_heads": ("num_attention_heads", 16),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("qkv_bias", True),
    "layer_scale": ("layer_scale", False),  # no reader's: the tensors are there, or are not
    "initializer_range": ("initializer_range", 0.02),
    "patch_size": ("patch", 16),
    "num_channels": ("channels", 3),
    "min_num_patches": ("min_patches", 1024),
    "max_num_patches": ("max_patches", 13312),
    "video_temporal_patch_size": ("frames", 2),
    "norm_mean": ("mean", list(VisionConfig.mean)),
    "norm_std": ("std", list(VisionConfig.std)),
}
COPIES = (  # published files have these also around the section, or in its ``args``
    "patch_size",
    "min_num_patches",
    "max_num_patches",
    "video_temporal_patch_size",
    "norm_mean",
    "norm_std",
)
OUTER: dict[str, tuple[str, Any]] = {  # keys around the section; 21 and 22 are <img> and </img>
    "projector_hidden_size": ("projector_size", 4096),
    "video_pruning_rate": ("pruning", 0.0),
    "img_start_token_id": ("start_token", 21),
    "img_end_token_id": ("end_token", 22),
}
OUTER_SOUND: dict[str, tuple[str, Any]] = {
    "sound_start_token_id": ("start_token", -1),
    "sound_end_token_id": ("end_token", -1),
}
MADE: dict[str, float] = {  # numbers of which settings are made
    "hidden_size": 1280,
    "patch_size": 16,
    "mlp_ratio": 4.0,
    "max_img_size": 2048,
    "num_cls_tokens": 3,
    "num_registers": 7,
    "video_target_num_patches": 1024,
}


def read_config(values: Mapping[str, Any]) -> tuple[Modules | None, list[Problem]]:
    """The modules that a ``config.json`` describes, and everything in it that we cannot do.

    Encoders are called ``vision`` and ``audio``. Whether layers of the vision encoder have scales, only the
    tensors say.
    """
    values, problems = _published(values)
    problems += _refused(values, FIXED)
    decoder, more = hf_hybrid.read_config(_section(values, LLM))
    problems += [problem.under(LLM) for problem in more]
    if decoder is None:
        return None, problems
    encoders: dict[str, EncoderConfig] = {}
    vision, more = _read_vision(values, decoder)
    problems += more
    if vision:
        encoders["vision"] = vision
    if values.get(SOUND) is not None:
        audio, more = _read_audio(values, decoder)
        problems += more
        if audio:
            encoders["audio"] = audio
    return Modules(decoder, encoders), problems


def _published(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The same under published keys; two names of one key must not disagree."""
    known, problems = dict(values), list[Problem]()
    for key, alias in ALIASES.items():
        other = known.pop(alias, None)
        if other is not None and known.get(key) not in (None, other):
            problems.append(Problem(alias, f"{other!r}, but {key} is {known[key]!r}; keep one"))
        known[key] = known.get(key) if other is None else other
    return known, problems


def _section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _refused(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> Iterator[Problem]:
    for key, only in fixed.items():
        if values.get(key) not in (None, only):
            wanted = "absent" if only is None else repr(only)
            yield Problem(key, f"{values[key]!r} is not supported; it must be {wanted}")


def _read_vision(
    values: Mapping[str, Any], decoder: HybridConfig
) -> tuple[VisionConfig | None, list[Problem]]:
    section, problems = _merged(values)
    problems += [*_refused(section, FIXED_VISION), *_refused(_section(section, "args"), FIXED_ARGS)]
    made, more = _made(section)
    problems += more
    if (width := values.get(WIDTH)) not in (None, made["hidden_size"]):
        problems.append(Problem("hidden_size", f"{made['hidden_size']}, but {WIDTH} is {width}"))
    if (token := values.get(PICTURE_TOKEN)) is None:
        problems.append(Problem(PICTURE_TOKEN, "is missing; it is the placeholder of pictures"))
    known = {ours: section.get(key, default) for key, (ours, default) in FIELDS.items()}
    known |= {ours: values.get(key, default) for key, (ours, default) in OUTER.items()}
    known |= {
        "intermediate_size": int(made["hidden_size"] * made["mlp_ratio"]),
        "prefix": int(made["num_cls_tokens"] + made["num_registers"]),
        "max_grid": int(made["max_img_size"] // made["patch_size"]),
        "video_grid": isqrt(int(made["video_target_num_patches"])) // 2 * 2,
        "final_norm": bool(decoder.parts.mtp),
        "output_size": decoder.hidden_size,
        "token": 0 if token is None else token,
    }
    config, more = read(VisionConfig, known)
    return config, [problem.under(PICTURES) for problem in problems + more]


def _merged(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The section of vision with what stands around it; null is absent, copies must not disagree."""
    section = {key: value for key, value in _section(values, PICTURES).items() if value is not None}
    problems: list[Problem] = []
    for key in COPIES:
        for place in (_section(section, "args"), values):
            if (other := place.get(key)) is not None and section.setdefault(key, other) != other:
                problems.append(Problem(key, f"{section[key]!r}, but a copy of it is {other!r}; keep one"))
    return section, problems


def _made(section: Mapping[str, Any]) -> tuple[dict[str, float], list[Problem]]:
    """Numbers of which settings are made; where one is none, the default, and a problem."""
    made, problems = dict(MADE), list[Problem]()
    for key in MADE:
        value = section.get(key, MADE[key])
        least = 0 if key == "num_registers" else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e9:
            problems.append(Problem(key, f"expected a number of at least {least}, not {value!r}"))
        else:
            made[key] = value
    if made["max_img_size"] % made["patch_size"]:
        message = f"{made['max_img_size']} pixels are not divided by patch_size = {made['patch_size']}"
        problems.append(Problem("max_img_size", message))
    return made, problems


def _read_audio(values: Mapping[str, Any], decoder: HybridConfig) -> tuple[AudioConfig | None, list[Problem]]:
    token = values.get(SOUND_TOKEN)
    section = _section(values, SOUND)
    config, problems = hf_audio.read_config(section, decoder.hidden_size, 0 if token is None else token)
    if token is None:
        problems = [*problems, Problem(SOUND_TOKEN, "is missing; it is the placeholder of sound")]
    if config:
        ends = {ours: values.get(key, default) for key, (ours, default) in OUTER_SOUND.items()}
        config, more = read(AudioConfig, to_dict(config) | ends)
        problems = problems + more
    return config, [problem.under(SOUND) for problem in problems]


def write_config(modules: Modules) -> dict[str, Any]:
    """The ``config.json`` of modules that can be published, in keys that transformers and older readers know.

    Raises:
        ValueError: they cannot be.
    """
    if problems := unpublishable(modules):
        raise ValueError(str(problems[0]))
    (vision,) = (one for one in modules.encoders.values() if isinstance(one, VisionConfig))
    values = to_dict(vision)
    section = {key: values[ours] for key, (ours, _) in FIELDS.items()} | {
        "model_type": "radio",
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "max_img_size": vision.max_grid * vision.patch,
        "num_cls_tokens": min(vision.prefix, 3),
        "num_registers": max(0, vision.prefix - 3),
        "video_target_num_patches": vision.video_grid**2,
        "hidden_act": FIXED_VISION["hidden_act"],
    }
    return {
        "architectures": ["NemotronH_Omni_Reasoning_V3"],
        "model_type": MODEL_TYPE,
        "downsample_ratio": FIXED["downsample_ratio"],
        "ps_version": FIXED["ps_version"],
        PICTURE_TOKEN: vision.token,
        WIDTH: vision.hidden_size,
        "video_temporal_patch_size": vision.frames,
        "patch_size": vision.patch,
        "norm_mean": list(vision.mean),
        "norm_std": list(vision.std),
        **{key: values[ours] for key, (ours, _) in OUTER.items()},
        LLM: hf_hybrid.write_config(modules.decoder),
        PICTURES: section,
        **_write_audio(modules),
    }


def _write_audio(modules: Modules) -> dict[str, Any]:
    for one in modules.encoders.values():
        if isinstance(one, AudioConfig):
            ends = {key: getattr(one, ours) for key, (ours, _) in OUTER_SOUND.items()}
            # files on the Hub say "parakeet", which transformers 5.23 refuses
            section = hf_audio.write_config(one) | {"model_type": "parakeet_encoder"}
            return {SOUND_TOKEN: one.token, **ends, SOUND: section}
    return {}


def unpublishable(modules: Modules) -> list[Problem]:
    """What the published format cannot say about a model."""
    problems = [problem.under("model") for problem in hf_hybrid.unpublishable(modules.decoder)]
    kinds = sorted(encoder.kind for encoder in modules.encoders.values())
    if kinds not in (["vision"], ["audio", "vision"]):
        message = (
            f"{', '.join(kinds) or 'none'}; the published format has one of vision, and one of audio or none"
        )
        problems.append(Problem("encoders", message))
    for name, encoder in modules.encoders.items():
        match encoder:
            case VisionConfig():
                found = list(_unpublishable_vision(encoder, bool(modules.decoder.parts.mtp)))
            case AudioConfig():
                found = hf_audio.unpublishable(encoder)
            case _:
                found = [Problem("kind", f"{encoder.kind!r} has no published form")]
        problems += [problem.under(f"encoders.{name}") for problem in found]
    return problems


def _unpublishable_vision(config: VisionConfig, mtp: bool) -> Iterator[Problem]:
    only = {"merge": 2, "projector_bias": False, "projector_eps": 1e-5, "final_norm": mtp}
    for name, value in only.items():
        if getattr(config, name) != value:
            why = " (a decoder with MTP depths, and no other, has it)" if name == "final_norm" else ""
            message = f"{getattr(config, name)!r}, but the published format has {value!r} only{why}"
            yield Problem(name, message)
    if not config.frames:
        yield Problem("frames", "0, but the published format always has a projection of videos")
    width, inner = config.hidden_size, config.intermediate_size
    if int(width * (inner / width)) != inner:
        message = f"{inner}, which the published format, a ratio to hidden_size = {width}, cannot say"
        yield Problem("intermediate_size", message)
