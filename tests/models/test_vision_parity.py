"""The vision encoder against transformers' ``radio`` and ``nemotron_h_omni``: values, gradients, names.

transformers resizes positions and normalizes in fp32 whatever the model is; in the fp64 tests both are made
to keep fp64, so that nothing but the mathematics is compared.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tiny import CONFIG as DECODER
from weft.models.hf_hybrid import write_config
from weft.models.hf_vision import CONSTANTS, LIVE, PUBLISHED, tensor_links
from weft.models.presets import CRADIO_V4_H, CRADIO_V4_H_TINY
from weft.models.vision import VisionEncoder, choose
from weft.plan.items import Pieces
from weft.spec.vision import VisionConfig, kept

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}


def draw(seed: int, **changes: Any) -> VisionConfig:
    """A random tiny encoder for the tiny decoder; numbers of pixels are exact in fp32."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([1, 2, 4]))
    width = heads * int(rng.choice([4, 8]))
    config = replace(
        CRADIO_V4_H_TINY,
        hidden_size=width,
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        intermediate_size=width * int(rng.integers(1, 5)),
        patch=int(rng.integers(2, 5)),
        frames=int(rng.integers(2, 4)),
        prefix=int(rng.integers(2, 6)),
        max_grid=int(rng.integers(3, 9)),
        qkv_bias=bool(rng.integers(2)),
        layer_scale=True,
        final_norm=bool(seed % 2),
        layer_norm_eps=float(rng.choice([1e-6, 1e-3])),
        projector_size=int(rng.integers(5, 40)),
        output_size=DECODER.hidden_size,
        mean=(0.5, 0.25, 0.375),
        std=(0.25, 0.5, 0.125),
    )
    return replace(config, **changes)


def radio(config: VisionConfig) -> Any:
    from transformers import RadioConfig

    return RadioConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        layer_norm_eps=config.layer_norm_eps,
        qkv_bias=config.qkv_bias,
        patch_size=config.patch,
        num_channels=config.channels,
        max_img_size=config.patch * config.max_grid,
        num_cls_tokens=2,
        num_registers=config.prefix - 2,
        video_temporal_patch_size=config.frames or None,
        norm_mean=list(config.mean),
        norm_std=list(config.std),
    )


def omni(config: VisionConfig, **text: Any) -> Any:
    """transformers' whole model, with a tiny decoder of the right width."""
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config, NemotronHConfig

    decoder = write_config(replace(DECODER, hidden_size=config.output_size, pattern="M", mtp_num_depths=0))
    decoder |= {"num_nextn_predict_layers": int(config.final_norm), **text}
    return NemotronH_Omni_Reasoning_V3(
        NemotronH_Omni_Reasoning_V3_Config(
            vision_config=radio(config),
            text_config=NemotronHConfig(**decoder),
            projector_hidden_size=config.projector_size,
            vision_hidden_size=config.hidden_size,
            video_temporal_patch_size=config.frames,
        )
    ).eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Every parameter, at scales at which all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("position_embedding", "cls_register_token")):
            value = normal
        elif name.endswith("bias"):
            value = 0.3 * normal
        else:
            value = 1.2 * normal / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.3 * normal
        tensor.copy_(value)


def ours_from(config: VisionConfig, theirs: dict[str, Tensor], prefix: str = "") -> VisionEncoder:
    """Our encoder with their values."""
    dtype = next(iter(theirs.values())).dtype
    model = VisionEncoder(config).to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, value in gather(config, theirs, prefix).items():
            model.get_parameter(name).copy_(value)
    return model


def gather(config: VisionConfig, theirs: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Our tensors from theirs (values or gradients); what they lack is NaN."""
    dtype = next(iter(theirs.values())).dtype
    found = {spec.name: torch.full(spec.shape, torch.nan, dtype=dtype) for spec in config.params()}
    for link in tensor_links(config, LIVE):
        name = link.theirs.removeprefix(prefix)
        if name in theirs:
            box = tuple(slice(a, a + n) for a, n in zip(link.start, link.size, strict=True))
            found[link.ours][box] = theirs[name].view(link.size)
    return found


def compare(model: VisionEncoder, theirs: nn.Module, got: Tensor, want: Tensor, prefix: str = "") -> None:
    """Outputs, and gradients of every parameter that they have, each relative to its largest element."""
    close = CLOSE[got.dtype]
    assert want.std() >= 0.5
    assert (got - want).abs().max() <= close * want.abs().max()
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(want.dtype)
    for out in (got, want):
        out.backward(cotangent)
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, gradient in gather(model.config, named, prefix).items():
        mine = model.get_parameter(name).grad
        if gradient.isnan().all():  # of a part that this test does not use
            assert mine is None or not mine.any(), name
        else:
            assert (mine - gradient).abs().max() <= close * gradient.abs().max(), name


def whole(config: VisionConfig, sizes: list[tuple[int, ...]]) -> Pieces:
    return Pieces.all(sizes, [config.rows(size) for size in sizes])


class WideNorm(nn.Module):
    """Their RMSNorm without the detour through fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    if request.param == torch.float64:
        monkeypatch.setattr(Tensor, "float", Tensor.double)
    return request.param


Made = tuple[Any, VisionEncoder]


@pytest.fixture
def pair(dtype: torch.dtype) -> Callable[[VisionConfig, int], Made]:
    def make(config: VisionConfig, seed: int) -> Made:
        theirs = omni(config)
        randomize(theirs, seed)
        theirs = theirs.to(dtype)
        theirs.vision_model.config.dtype = dtype
        if dtype == torch.float64:
            theirs.multi_modal_projector.layer_norm = WideNorm(theirs.multi_modal_projector.layer_norm)
        return theirs, ours_from(config, dict(theirs.named_parameters()))

    return make


def pictures(
    config: VisionConfig, seed: int, dtype: torch.dtype
) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Grids (below, at and above the table's size), and row-major patches."""
    rng = np.random.default_rng(seed)
    grids = [(2, 2), (2, 8), (10, 4), *(tuple(2 * rng.integers(1, 7, 2)) for _ in range(3))]
    pixels = config.channels * config.patch**2
    patches = [torch.from_numpy(rng.normal(0.4, 0.3, (r * c, pixels))).to(dtype) for r, c in grids]
    return [(1, int(r), int(c)) for r, c in grids], patches


@pytest.mark.parametrize("seed", range(3))
def test_radio_on_pictures_of_many_sizes(seed: int, dtype: torch.dtype) -> None:
    from transformers import RadioModel

    config = draw(seed, final_norm=False)
    theirs = RadioModel(radio(config)).eval()
    randomize(theirs, seed)
    theirs = theirs.to(dtype)
    sizes, patches = pictures(config, seed, dtype)
    want = theirs(torch.cat(patches), image_grid_hw=torch.tensor([size[1:] for size in sizes])).features
    parts = zip(want.split([len(p) for p in patches]), sizes, strict=True)
    want = torch.cat([part[config.order(*size[1:])].view(-1, config.feature_width) for part, size in parts])

    model = ours_from(config, dict(theirs.named_parameters()), "vision_model.")
    mean, std = (
        torch.tensor(t, dtype=dtype).repeat_interleave(config.patch**2) for t in (config.mean, config.std)
    )
    data = [((p - mean) / std)[config.order(*size[1:])] for p, size in zip(patches, sizes, strict=True)]
    ctx = model.context(whole(config, sizes))
    got = model.last(model.through(model.first(data, ctx), range(config.num_hidden_layers), ctx), ctx)
    compare(model, theirs, got, want, "vision_model.")


@pytest.mark.parametrize("seed", range(4))
def test_pictures(seed: int, dtype: torch.dtype, pair: Callable[[VisionConfig, int], Made]) -> None:
    config = draw(seed)
    theirs, model = pair(config, seed)
    sizes, patches = pictures(config, seed, dtype)
    grids = torch.tensor([size[1:] for size in sizes])
    want = torch.cat(theirs.get_image_features(torch.cat(patches), grids).pooler_output)
    data = [p[config.order(*size[1:])] for p, size in zip(patches, sizes, strict=True)]
    got = model(data, model.context(whole(config, sizes)))
    compare(model, theirs, got, want)


@pytest.mark.parametrize("seed", range(4))
def test_video(seed: int, dtype: torch.dtype, pair: Callable[[VisionConfig, int], Made]) -> None:
    config = draw(seed)
    theirs, model = pair(config, seed)
    rows, cols, groups, side, frames = 4, 6, 3, config.patch, config.frames
    generator = torch.Generator().manual_seed(seed)
    shape = (groups * frames, config.channels, rows * side, cols * side)
    video = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    want = theirs.get_video_features(video).pooler_output.flatten(0, 1)
    patches = video.view(groups, frames, config.channels, rows, side, cols, side)
    patches = patches.permute(0, 3, 5, 1, 2, 4, 6).reshape(groups, rows * cols, -1)
    sizes = [(frames, rows, cols)] * groups
    got = model(list(patches[:, config.order(rows, cols)]), model.context(whole(config, sizes)))
    compare(model, theirs, got, want)


@pytest.mark.parametrize("naming", [LIVE, PUBLISHED])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("full", [CRADIO_V4_H, draw(1, mean=CRADIO_V4_H.mean)], ids=["full size", "tiny"])
def test_the_table_names_every_tensor(naming: str, final_norm: bool, full: VisionConfig) -> None:
    """Names and shapes of what transformers holds and of what it writes, both ways, at full size."""
    from transformers.core_model_loading import revert_weight_conversion

    config = replace(full, layer_scale=True, final_norm=final_norm)
    with torch.device("meta"):
        model = omni(config)
    state = model.state_dict()
    if naming == PUBLISHED:
        state = revert_weight_conversion(model, state)
    outside = ("language_model.", *CONSTANTS)
    want = {name: tuple(t.shape) for name, t in state.items() if not name.startswith(outside)}
    links = tensor_links(config, naming)
    assert {link.theirs: link.shape for link in links} == want
    assert len(links) == len(want)
    assert sum(spec.numel for spec in config.params()) == sum(int(np.prod(shape)) for shape in want.values())
    plain = {link.theirs for link in tensor_links(replace(config, layer_scale=False), naming)}
    assert want.keys() - plain == {name for name in want if "layer_scale" in name}


@pytest.mark.parametrize("seed", range(12))
def test_the_rows_that_a_video_keeps(seed: int) -> None:
    """Random videos, of which some frames, cells or all rows repeat."""
    from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

    rng = np.random.default_rng(seed)
    groups, rows, cols = rng.integers(1, 7, 3).tolist()
    video = torch.from_numpy(rng.normal(size=(groups, rows * cols, 5)))
    if seed % 3 == 1:
        video[:, ::2] = video[:1, ::2]
    if seed % 3 == 2:
        video[groups // 2 :] = 1.0
    pruning = float(rng.choice([0.0, 0.3, 0.7, 0.95]))
    mask = compute_retention_mask(
        video_embeds=video.flatten(0, 1), thw=(groups, rows, cols), spatial_merge_size=1, q=pruning
    )
    chosen = choose(video.flatten(0, 1), groups, rows * cols, pruning)
    assert chosen.tolist() == mask.nonzero().flatten().tolist()
    assert len(chosen) == kept(groups, rows * cols, pruning)
