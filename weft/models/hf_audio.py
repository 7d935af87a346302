"""The sound encoder of Nemotron omni models as published: tensor names and keys of ``config.json``.

The encoder is transformers' ``parakeet`` under its own names; only the prefixes differ between the files on
the Hub (``PUBLISHED``) and a model that transformers has loaded (``LIVE``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from weft.config.errors import Problem
from weft.config.load import read
from weft.models.hf_table import Link, Place, Row, links
from weft.spec.audio import AudioConfig

UNUSED = ("num_batches_tracked", "feature_extractor.")
"""In names of published tensors that no layer reads: counters of batch norms, filters of mel features."""

FIRST = (
    Row("first.weight", ("subsampling.layers.0.weight",)),
    Row("first.bias", ("subsampling.layers.0.bias",)),
    Row("linear.weight", ("subsampling.linear.weight",)),
    Row("linear.bias", ("subsampling.linear.bias",)),
)
STAGE = (  # layers are counted through: a depthwise one, a pointwise one, an activation
    Row("depthwise.weight", ("subsampling.layers.{depthwise}.weight",)),
    Row("depthwise.bias", ("subsampling.layers.{depthwise}.bias",)),
    Row("pointwise.weight", ("subsampling.layers.{pointwise}.weight",)),
    Row("pointwise.bias", ("subsampling.layers.{pointwise}.bias",)),
)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYER = (
    Row("norm_feed1.weight", ("norm_feed_forward1.weight",)),
    Row("norm_feed1.bias", ("norm_feed_forward1.bias",)),
    Row("feed1.up_proj.weight", ("feed_forward1.linear1.weight",)),
    Row("feed1.up_proj.bias", ("feed_forward1.linear1.bias",)),
    Row("feed1.down_proj.weight", ("feed_forward1.linear2.weight",)),
    Row("feed1.down_proj.bias", ("feed_forward1.linear2.bias",)),
    Row("norm_attention.weight", ("norm_self_att.weight",)),
    Row("norm_attention.bias", ("norm_self_att.bias",)),
    Row("attention.qkv_proj.weight", tuple(f"{name}.weight" for name in QKV), "rows"),
    Row("attention.qkv_proj.bias", tuple(f"{name}.bias" for name in QKV), "rows"),
    Row("attention.o_proj.weight", ("self_attn.o_proj.weight",)),
    Row("attention.o_proj.bias", ("self_attn.o_proj.bias",)),
    Row("attention.relative.weight", ("self_attn.relative_k_proj.weight",)),
    Row("attention.bias_u", ("self_attn.bias_u",)),
    Row("attention.bias_v", ("self_attn.bias_v",)),
    Row("norm_conv.weight", ("norm_conv.weight",)),
    Row("norm_conv.bias", ("norm_conv.bias",)),
    Row("conv.up_proj.weight", ("conv.pointwise_conv1.weight",)),
    Row("conv.up_proj.bias", ("conv.pointwise_conv1.bias",)),
    Row("conv.depthwise.weight", ("conv.depthwise_conv.weight",), "tap"),
    Row("conv.depthwise.bias", ("conv.depthwise_conv.bias",)),
    Row("conv.norm.weight", ("conv.norm.weight",)),
    Row("conv.norm.bias", ("conv.norm.bias",)),
    Row("conv.norm.mean", ("conv.norm.running_mean",)),
    Row("conv.norm.var", ("conv.norm.running_var",)),
    Row("conv.down_proj.weight", ("conv.pointwise_conv2.weight",)),
    Row("conv.down_proj.bias", ("conv.pointwise_conv2.bias",)),
    Row("norm_feed2.weight", ("norm_feed_forward2.weight",)),
    Row("norm_feed2.bias", ("norm_feed_forward2.bias",)),
    Row("feed2.up_proj.weight", ("feed_forward2.linear1.weight",)),
    Row("feed2.up_proj.bias", ("feed_forward2.linear1.bias",)),
    Row("feed2.down_proj.weight", ("feed_forward2.linear2.weight",)),
    Row("feed2.down_proj.bias", ("feed_forward2.linear2.bias",)),
    Row("norm_out.weight", ("norm_out.weight",)),
    Row("norm_out.bias", ("norm_out.bias",)),
)
POINTWISE = ("pointwise_conv1.weight", "pointwise_conv2.weight")  # of a layer: ``[rows, cols, 1]`` there


@dataclass(frozen=True)
class Naming:
    """What two ways to name the same encoder differ in.

    Attributes:
        encoder: prefix of the encoder.
        projector: prefix of the projector.
        norm: the projector's norm.
        products: its products.
    """

    encoder: str
    projector: str
    norm: str
    products: tuple[str, str]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The table of the projector."""
        names = {"norm": self.norm, "up": self.products[0], "down": self.products[1]}
        kinds = ("weight", "bias")
        return tuple(
            Row(f"{ours}.{kind}", (f"{name}.{kind}",)) for ours, name in names.items() for kind in kinds
        )


PUBLISHED = Naming("sound_encoder.encoder.", "sound_projection.", "norm", ("linear1", "linear2"))
LIVE = Naming("audio_tower.", "embed_audio.", "layer_norm", ("linear_1", "linear_2"))


def tensor_links(config: AudioConfig, naming: Naming = PUBLISHED) -> tuple[Link, ...]:
    """Every published tensor of an encoder and its projector, apart from ``UNUSED`` ones."""
    return tuple(
        replace(link, shape=(*link.shape, 1)) if link.theirs.endswith(POINTWISE) else link
        for link in links(_places(config, naming), config.params())
    )


def _places(config: AudioConfig, naming: Naming) -> Iterator[Place]:
    yield Place("embed.", naming.encoder, FIRST)
    for i in range(config.halvings - 1):
        at = {"depthwise": 2 + 3 * i, "pointwise": 3 + 3 * i}
        rows = tuple(Row(row.ours, (row.theirs[0].format(**at),)) for row in STAGE)
        yield Place(f"embed.stages.{i}.", naming.encoder, rows)
    for n in range(config.num_hidden_layers):
        yield Place(f"layers.{n}.", f"{naming.encoder}layers.{n}.", LAYER)
    yield Place("projector.", naming.projector, naming.rows)


# Keys of ``sound_config``, our settings, and what transformers takes in an omni model where a key is absent.
FIELDS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 1024),
    "num_hidden_layers": ("num_hidden_layers", 24),
    "num_attention_heads": ("num_attention_heads", 8),
    "intermediate_size": ("intermediate_size", 4096),
    "attention_bias": ("attention_bias", False),
    "convolution_bias": ("conv_bias", True),
    "conv_kernel_size": ("conv_kernel", 9),
    "subsampling_factor": ("subsampling", 8),
    "subsampling_conv_channels": ("subsampling_channels", 256),
    "num_mel_bins": ("mels", 80),
    "scale_input": ("scale_input", False),
    "initializer_range": ("initializer_range", 0.02),
    "projection_hidden_size": ("projector_size", 4096),
    "projection_bias": ("projector_bias", False),
    "sampling_rate": ("sample_rate", 16000),
}
FIXED: dict[str, Any] = {  # keys of which we know only one value
    "hidden_act": "silu",
    "subsampling_conv_kernel_size": 3,
    "subsampling_conv_stride": 2,
}


def read_config(
    values: Mapping[str, Any], output_size: int, token: int
) -> tuple[AudioConfig | None, list[Problem]]:
    """The encoder that a ``sound_config`` describes, and everything in it that we cannot do.

    Dropout is not read: it is training's choice, and this encoder has none.

    Args:
        values: the section of ``config.json``.
        output_size: width of the decoder.
        token: ``sound_context_token_id`` of the whole model.
    """
    problems = [
        Problem(key, f"{values[key]!r} is not supported; it must be {only!r}")
        for key, only in FIXED.items()
        if values.get(key, only) != only
    ]
    known = {ours: values.get(key, default) for key, (ours, default) in FIELDS.items()}
    config, more = read(AudioConfig, {**known, "output_size": output_size, "token": token})
    return config, problems + more


def write_config(config: AudioConfig) -> dict[str, Any]:
    """The ``sound_config`` of an encoder."""
    known = {key: getattr(config, ours) for key, (ours, _) in FIELDS.items()}
    return {"model_type": "parakeet", **known, **FIXED}


def unpublishable(config: AudioConfig) -> list[Problem]:
    """What the published format cannot say about an encoder."""
    only = {"conv_norm": "batch", "layer_norm_eps": 1e-5, "projector_eps": 1e-5}
    return [
        Problem(name, f"{getattr(config, name)!r}, but the published format has {value!r} only")
        for name, value in only.items()
        if getattr(config, name) != value
    ]
