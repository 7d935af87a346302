"""Vision encoders as published: tensor names of RADIO inside an omni model, and of the projector.

``PUBLISHED`` names are those of the files of Nemotron 3 Nano Omni on the Hub; ``LIVE`` names are those of a
model that transformers has loaded (``nemotron_h_omni``, and ``radio`` below ``vision_model.``).
"""

from collections.abc import Iterator
from dataclasses import replace

from weft.models.hf_table import Link, Place, Row, links
from weft.spec.vision import VisionConfig

LIVE_PREFIX, PUBLISHED_PREFIX = "vision_model.", "vision_model.radio_model.model."

LIVE_EMBED = (
    Row("image.weight", ("embeddings.patch_projection.weight",)),
    Row("video.weight", ("embeddings.video_patch_projection.weight",)),
    Row("position", ("embeddings.position_embedding",)),
    Row("prefix", ("embeddings.cls_register_token",)),
)
PUBLISHED_EMBED = (
    Row("image.weight", ("patch_generator.embedder.weight",)),
    Row("video.weight", ("patch_generator.video_embedder.weight",)),
    Row("position", ("patch_generator.pos_embed",)),
    Row("prefix", ("patch_generator.cls_token.token",)),
)
SHARED = (
    Row("norm1.weight", ("norm1.weight",)),
    Row("norm1.bias", ("norm1.bias",)),
    Row("norm2.weight", ("norm2.weight",)),
    Row("norm2.bias", ("norm2.bias",)),
    Row("mlp.up_proj.weight", ("mlp.fc1.weight",)),
    Row("mlp.up_proj.bias", ("mlp.fc1.bias",)),
    Row("mlp.down_proj.weight", ("mlp.fc2.weight",)),
    Row("mlp.down_proj.bias", ("mlp.fc2.bias",)),
    Row("scale1", ("layer_scale1.lambda1",)),
    Row("scale2", ("layer_scale2.lambda1",)),
)
LIVE_LAYER = (
    *SHARED,
    Row(
        "attention.qkv_proj.weight",
        ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
        "rows",
    ),
    Row(
        "attention.qkv_proj.bias",
        ("attention.q_proj.bias", "attention.k_proj.bias", "attention.v_proj.bias"),
        "rows",
    ),
    Row("attention.o_proj.weight", ("attention.o_proj.weight",)),
    Row("attention.o_proj.bias", ("attention.o_proj.bias",)),
)
PUBLISHED_LAYER = (
    *SHARED,
    Row("attention.qkv_proj.weight", ("attn.qkv.weight",)),
    Row("attention.qkv_proj.bias", ("attn.qkv.bias",)),
    Row("attention.o_proj.weight", ("attn.proj.weight",)),
    Row("attention.o_proj.bias", ("attn.proj.bias",)),
)
NORM = (
    Row("norm.weight", ("vision_final_layernorm.weight",)),
    Row("norm.bias", ("vision_final_layernorm.bias",)),
)
LIVE_PROJECTOR = (
    Row("norm.weight", ("layer_norm.weight",)),
    Row("up.weight", ("linear_1.weight",)),
    Row("up.bias", ("linear_1.bias",)),
    Row("down.weight", ("linear_2.weight",)),
    Row("down.bias", ("linear_2.bias",)),
)
PUBLISHED_PROJECTOR = (
    Row("norm.weight", ("0.weight",)),
    Row("up.weight", ("1.weight",)),
    Row("up.bias", ("1.bias",)),
    Row("down.weight", ("3.weight",)),
    Row("down.bias", ("3.bias",)),
)
LIVE, PUBLISHED = "live", "published"

# Tensors of those files that are no parameters: statistics of pixels, and which prefix rows are summaries.
CONSTANTS = (
    "vision_model.summary_idxs",
    "vision_model.input_conditioner.norm_mean",
    "vision_model.input_conditioner.norm_std",
    "vision_model.radio_model.summary_idxs",
    "vision_model.radio_model.input_conditioner.norm_mean",
    "vision_model.radio_model.input_conditioner.norm_std",
)


def tensor_links(config: VisionConfig, naming: str = PUBLISHED) -> tuple[Link, ...]:
    """Every tensor of an encoder and its projector, in one of two namings (``LIVE``, ``PUBLISHED``)."""
    found = links(_places(config, naming == LIVE), config.params())
    return tuple(replace(k, shape=(1, *k.shape)) if k.ours == "embed.position" else k for k in found)


def _places(config: VisionConfig, live: bool) -> Iterator[Place]:
    prefix, layers = (LIVE_PREFIX, "encoder.layer") if live else (PUBLISHED_PREFIX, "blocks")
    yield Place("embed.", prefix, LIVE_EMBED if live else PUBLISHED_EMBED)
    for n in range(config.num_hidden_layers):
        yield Place(f"layers.{n}.", f"{prefix}{layers}.{n}.", LIVE_LAYER if live else PUBLISHED_LAYER)
    yield Place("", "", NORM)
    if live:
        yield Place("projector.", "multi_modal_projector.", LIVE_PROJECTOR)
    else:
        yield Place("projector.", "mlp1.", PUBLISHED_PROJECTOR)
