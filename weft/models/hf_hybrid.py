"""The hybrid family (Nemotron-H, Nano v2, Nemotron 3) as published: tensor names and ``config.json``.

``PUBLISHED`` names are those of the files on the Hub, which transformers also writes; ``LIVE`` names are
those of a model that transformers has loaded (and of ``save_pretrained(save_original_format=False)``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from weft.config.errors import Problem
from weft.config.load import read, to_dict
from weft.models.hf_table import Link, Place, Row, links
from weft.spec.hybrid import HybridConfig

MODEL_TYPE = "nemotron_h"
MTP_DEPTHS = 64  # more than any model has: a bound for files that lie

MODEL = (
    Row("embed.weight", ("embeddings.weight",)),
    Row("norm.weight", ("norm_f.weight",)),
)
HEAD = (Row("head.weight", ("lm_head.weight",)),)
NORM = Row("norm.weight", ("norm.weight",))
LAYER = {
    "M": (
        NORM,
        Row("mixer.in_proj.weight", ("mixer.in_proj.weight",)),
        Row("mixer.conv.weight", ("mixer.conv1d.weight",), "tap"),
        Row("mixer.conv.bias", ("mixer.conv1d.bias",)),
        Row("mixer.A_log", ("mixer.A_log",)),
        Row("mixer.D", ("mixer.D",)),
        Row("mixer.dt_bias", ("mixer.dt_bias",)),
        Row("mixer.norm.weight", ("mixer.norm.weight",)),
        Row("mixer.out_proj.weight", ("mixer.out_proj.weight",)),
    ),
    "*": (
        NORM,
        Row(
            "mixer.qkv_proj.weight",
            ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
            "rows",
        ),
        Row("mixer.o_proj.weight", ("mixer.o_proj.weight",)),
    ),
    "-": (
        NORM,
        Row("mixer.up_proj.weight", ("mixer.up_proj.weight",)),
        Row("mixer.down_proj.weight", ("mixer.down_proj.weight",)),
    ),
    "E": (
        NORM,
        Row("mixer.router.weight", ("mixer.gate.weight",)),
        Row("mixer.router.bias", ("mixer.gate.e_score_correction_bias",)),
        Row("mixer.experts.up_proj", ("mixer.experts.{}.up_proj.weight",), "stack"),
        Row("mixer.experts.down_proj", ("mixer.experts.{}.down_proj.weight",), "stack"),
        Row("mixer.shared.up_proj.weight", ("mixer.shared_experts.up_proj.weight",)),
        Row("mixer.shared.down_proj.weight", ("mixer.shared_experts.down_proj.weight",)),
        Row("mixer.latent_down.weight", ("mixer.fc1_latent_proj.weight",)),
        Row("mixer.latent_up.weight", ("mixer.fc2_latent_proj.weight",)),
    ),
}
MTP_FIRST = (  # beside the first inner layer of a depth
    Row("enorm.weight", ("enorm.weight",)),
    Row("hnorm.weight", ("hnorm.weight",)),
    Row("eh_proj.weight", ("eh_proj.weight",)),
)
MTP_LAST = (Row("norm.weight", ("final_layernorm.weight",)),)  # beside its last


@dataclass(frozen=True)
class Naming:
    """What two ways to name the same model differ in."""

    prefix: str
    stacked: bool

    def row(self, row: Row) -> Row:
        """The row under this naming: a stack may be one tensor."""
        if row.op == "stack" and self.stacked:
            return Row(row.ours, (row.theirs[0].replace(".{}", "").removesuffix(".weight"),))
        return row


PUBLISHED = Naming("backbone.", stacked=False)
LIVE = Naming("model.", stacked=True)


def tensor_links(config: HybridConfig, naming: Naming = PUBLISHED) -> tuple[Link, ...]:
    """Every published tensor of a model; a tied head is published as a copy of the token table."""
    found = links(_places(config, naming), config.params())
    if config.tie_word_embeddings:
        table = next(link for link in found if link.ours == "embed.weight")
        found += (replace(table, theirs="lm_head.weight", copy=True),)
    return found


def _places(config: HybridConfig, naming: Naming) -> Iterator[Place]:
    layer = {symbol: tuple(map(naming.row, rows)) for symbol, rows in LAYER.items()}
    yield Place("", naming.prefix, MODEL)
    yield Place("", "", HEAD)
    for n, symbol in enumerate(config.parts.main):
        yield Place(f"layers.{n}.", f"{naming.prefix}layers.{n}.", layer[symbol])
    flat = 0  # published MTP layers of all depths are counted through
    for k, depth in enumerate(config.parts.mtp):
        yield Place(f"mtp.{k}.", f"mtp.layers.{flat}.", MTP_FIRST)
        for n, symbol in enumerate(depth):
            yield Place(f"mtp.{k}.layers.{n}.", f"mtp.layers.{flat + n}.", layer[symbol])
        flat += len(depth)
        yield Place(f"mtp.{k}.", f"mtp.layers.{flat - 1}.", MTP_LAST)


# Keys that are also our settings, with what transformers takes where they are absent or null.
FIELDS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "time_step_limit": [0.0, float("inf")],
    "intermediate_size": 21504,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": 0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
ALIASES = {  # older names of the same settings
    "attention_head_dim": "head_dim",
    "norm_eps": "layer_norm_epsilon",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
}
FIXED: dict[str, Any] = {  # keys of which we know only one value
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "n_shared_experts": 1,
    "sliding_window": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "quantization_config": None,
    "block_configs": None,
}
LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}


def read_config(values: Mapping[str, Any]) -> tuple[HybridConfig | None, list[Problem]]:
    """The model that a ``config.json`` describes, and everything in it that we cannot do."""
    problems = list(_refusals(values))
    known, clashes = _known(values)
    main, main_problems = _pattern(values, "hybrid_override_pattern", ("layers_block_type", "layer_types"))
    inner, mtp_problems = _pattern(values, "mtp_hybrid_override_pattern", ("mtp_layers_block_type",))
    problems += [*clashes, *main_problems, *mtp_problems]
    depths = values.get("num_nextn_predict_layers") or 0
    if not isinstance(depths, int) or not 0 <= depths <= MTP_DEPTHS:
        message = f"expected a whole number of at most {MTP_DEPTHS}, not {depths!r}"
        problems.append(Problem("num_nextn_predict_layers", message))
        depths = 0
    if main is None:
        problems.append(Problem("hybrid_override_pattern", "is missing; it names the layers"))
        return None, problems
    layers = values.get("num_hidden_layers")
    if layers is not None and layers != len(main):
        message = f"{layers!r}, but the layer pattern {main!r} names {len(main)} layers"
        problems.append(Problem("num_hidden_layers", message))
    known["pattern"] = "/".join([main, *[inner or "*E"] * depths])
    config, more = read(HybridConfig, known)
    return config, problems + more


def _refusals(values: Mapping[str, Any]) -> Iterator[Problem]:
    for key, only in FIXED.items():
        value = values.get(key)
        if value is not None and value != only:
            wanted = "absent" if only is None else repr(only)
            yield Problem(key, f"{value!r} is not supported; it must be {wanted}")


def _known(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    known, problems = dict(FIELDS), []
    given = {key: _number(value) for key, value in values.items() if value is not None}
    if "num_attention_heads" in given and values.get("num_key_value_heads", 0) is None:
        given["num_key_value_heads"] = given["num_attention_heads"]
    for alias, key in ALIASES.items():
        if alias in given and given.setdefault(key, given[alias]) != given[alias]:
            problems.append(Problem(alias, f"{given[alias]!r}, but {key} is {given[key]!r}; keep one"))
    known |= {key: given[key] for key in FIELDS if key in given}
    return known, problems


def _number(value: Any) -> Any:
    """A value as JSON cannot write it: transformers says infinity with ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return value["__float__"]
    return [_number(item) for item in value] if isinstance(value, list) else value


def _pattern(
    values: Mapping[str, Any], text_key: str, list_keys: tuple[str, ...]
) -> tuple[str | None, list[Problem]]:
    """The layers as letters, from a string or a list of words; the two must not disagree."""
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for key in (text_key, *list_keys):
        value = values.get(key)
        if value is None:
            continue
        letters = value if key == text_key else [LETTERS.get(str(word), "?") for word in _list(value)]
        if not isinstance(value, str if key == text_key else list) or not letters or "?" in letters:
            words = ", ".join(LETTERS)
            wanted = "letters M * - E" if key == text_key else f"a list of {words}"
            problems.append(Problem(key, f"expected {wanted}, not {value!r}"))
        elif "/" in letters:
            problems.append(Problem(key, f"{value!r} has '/'; MTP layers have a key of their own"))
        else:
            found[key] = "".join(letters)
    if len(set(found.values())) > 1:
        problems.append(Problem(text_key, f"keys name different layers: {found}"))
    return next(iter(found.values()), None), problems


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def write_config(config: HybridConfig) -> dict[str, Any]:
    """The ``config.json`` of a model, in keys that old and new readers know.

    Layers are named by pattern strings only: the first readers of the family refuse a list of words.
    """
    values = to_dict(config)
    parts = config.parts
    known = {key: values[key] for key in FIELDS}
    known["moe_latent_size"] = config.moe_latent_size or None
    if config.time_step_limit == (0.0, float("inf")):  # every reader's default, and no JSON number
        del known["time_step_limit"]
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        "hybrid_override_pattern": parts.main,
        "num_hidden_layers": len(parts.main),
        **({"mtp_hybrid_override_pattern": parts.mtp[0]} if parts.mtp else {}),
        "num_nextn_predict_layers": len(parts.mtp),
        **known,
        "norm_eps": config.layer_norm_epsilon,
        "expand": 2,
        "mamba_ssm_cache_dtype": "float32",
        "residual_in_fp32": False,
        "use_cache": True,
        **{key: value for key, value in FIXED.items() if value is not None},
    }


def unpublishable(config: HybridConfig) -> list[Problem]:
    """What the published format cannot say about a model."""
    if "E" in config.pattern and not config.moe_shared_expert_intermediate_size:
        message = "0, but the published format has a shared expert in every MoE layer"
        return [Problem("moe_shared_expert_intermediate_size", message)]
    return []


def without_mtp(config: HybridConfig) -> HybridConfig:
    """The same model without its MTP depths."""
    return replace(config, pattern=config.parts.main, mtp_num_depths=0)


def describes(values: Mapping[str, Any], config: HybridConfig) -> bool:
    """Whether a ``config.json`` may stand for a model.

    It may name MTP depths that the files beside it do not hold: transformers drops their tensors and keeps
    the keys.
    """
    found, problems = read_config(values)
    if found is None or problems:
        return False
    if not config.parts.mtp:
        found = without_mtp(found)
    return write_config(found) == write_config(config)
