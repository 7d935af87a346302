"""Vision encoders in the C-RADIO form (arXiv 2412.07679): images, and videos in groups of frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from weft.config.base import Config, setting
from weft.config.errors import Problem
from weft.spec.encoder import EncoderConfig, PieceAttentionConfig, under
from weft.spec.layers import LayerNormConfig, LinearConfig
from weft.spec.param import ONES, Init, ParamSpec, dim


@dataclass(frozen=True, kw_only=True)
class VisionMLPConfig(Config):
    """``down(gelu(up(x)))``, with biases."""

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    mlp: int = setting(doc="inner width", ge=1, dim="mlp")
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    @property
    def up_proj(self) -> LinearConfig:
        """Into the inner width."""
        return LinearConfig(rows=dim("mlp", self.mlp), cols=dim("embed", self.embed), std=self.std, bias=True)

    @property
    def down_proj(self) -> LinearConfig:
        """Back to the residual."""
        return LinearConfig(rows=dim("embed", self.embed), cols=dim("mlp", self.mlp), std=self.std, bias=True)

    def params(self) -> tuple[ParamSpec, ...]:
        """Up and down projection."""
        return under(up_proj=self.up_proj, down_proj=self.down_proj)


@dataclass(frozen=True, kw_only=True)
class VisionBlockConfig(Config):
    """One layer: ``x += scale1 * attention(norm1(x))``, then ``x += scale2 * mlp(norm2(x))``."""

    norm: LayerNormConfig
    attention: PieceAttentionConfig
    mlp: VisionMLPConfig
    layer_scale: bool = setting(False, "whether each branch has a factor per channel")

    @property
    def scales(self) -> tuple[ParamSpec, ...]:
        """Factors of the branches, or nothing."""
        dims = self.norm.dims
        names = ("scale1", "scale2") if self.layer_scale else ()
        return tuple(ParamSpec(name, (dims,), ONES, decay=False) for name in names)

    def params(self) -> tuple[ParamSpec, ...]:
        """Norms, attention, MLP, then the scales."""
        layers = under(norm1=self.norm, attention=self.attention, norm2=self.norm, mlp=self.mlp)
        return layers + self.scales


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(Config):
    """Patches to rows: projections of pictures and groups of frames, positions, rows before patches."""

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    pixels: int = setting(doc="numbers of a patch of one frame", ge=1)
    frames: int = setting(doc="frames of a group; 0: no video", ge=0)
    prefix: int = setting(doc="rows before the patches", ge=1)
    max_grid: int = setting(doc="side of the table of positions", ge=1)
    merge: int = setting(doc="side of a block of patches", ge=1)
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    def params(self) -> tuple[ParamSpec, ...]:
        """Projections, the table of positions (row-major), the prefix."""
        embed, normal = dim("embed", self.embed), Init("normal", self.std)
        specs = [ParamSpec("image.weight", (embed, dim("pixel", self.pixels)), normal)]
        if self.frames:
            group = dim("pixel", self.frames * self.pixels)
            specs.append(ParamSpec("video.weight", (embed, group), normal))
        tables = {"position": self.max_grid**2, "prefix": self.prefix}
        specs += [ParamSpec(name, (dim(name, rows), embed), normal) for name, rows in tables.items()]
        return tuple(specs)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EncoderConfig):
    """A vision transformer whose patches are merged in blocks before the projector.

    The size of a sequence is (frames, rows and columns of patches): 1 frame for a picture, ``frames`` for a
    group of frames of a video. A patch is ``[frames, channels, patch, patch]`` normalized numbers. The rows
    of a sequence are ``prefix`` learned ones, then the patches in block order (``order``).
    """

    kind: Literal["vision"] = setting("vision", "what the encoder reads")
    layer_norm_eps: float = setting(1e-6, "norm epsilon", gt=0)
    qkv_bias: bool = setting(True, "whether queries, keys and values have biases")
    layer_scale: bool = setting(False, "whether each branch has a trained factor per channel, 1 at first")
    final_norm: bool = setting(False, "whether a norm comes after the last layer")
    patch: int = setting(16, "side of a patch in pixels", ge=1)
    channels: int = setting(3, "channels of a pixel", ge=1)
    merge: int = setting(2, "side, in patches, of a block that becomes one row of the decoder", ge=1)
    frames: int = setting(2, "frames of a video that are read together; 0: no video", ge=0)
    prefix: int = setting(10, "learned rows before the patches (summaries and registers)", ge=1)
    max_grid: int = setting(128, "side of the table of positions, in patches", ge=1)
    mean: tuple[float, ...] = setting((0.48145466, 0.4578275, 0.40821073), "of each channel in 0..1")
    std: tuple[float, ...] = setting((0.26862954, 0.26130258, 0.27577711), "of each channel in 0..1")
    min_patches: int = setting(1024, "smallest picture, in patches", ge=1)
    max_patches: int = setting(13312, "largest picture, in patches", ge=1)
    video_grid: int = setting(32, "side of the frames of a video, in patches", ge=1)
    pruning: float = setting(0.0, "part of a video's rows that is dropped (arXiv 2604.24954)", ge=0, lt=1)

    def check(self) -> Iterator[Problem]:
        """Blocks divide grids, statistics are those of the channels."""
        yield from super().check()
        if self.frames == 1:
            yield Problem("frames", "1 frame is a picture; set at least 2, or 0 for no video")
        if self.video_grid % self.merge:
            message = f"{self.video_grid} patches are not divided by merge = {self.merge}"
            yield Problem("video_grid", message)
        if not self.merge**2 <= self.min_patches <= self.max_patches:
            limits = f"merge^2 = {self.merge**2} and max_patches = {self.max_patches}"
            yield Problem("min_patches", f"{self.min_patches} must be between {limits}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                message = f"{len(getattr(self, name))} numbers for {self.channels} channels; give one each"
                yield Problem(name, message)
        if any(value <= 0 for value in self.std):
            yield Problem("std", f"{list(self.std)}: every number must be more than 0")

    @property
    def embed(self) -> PatchesConfig:
        """Patches to rows."""
        return PatchesConfig(
            embed=self.hidden_size,
            pixels=self.channels * self.patch**2,
            frames=self.frames,
            prefix=self.prefix,
            max_grid=self.max_grid,
            merge=self.merge,
            std=self.initializer_range,
        )

    @property
    def _layer_norm(self) -> LayerNormConfig:
        return LayerNormConfig(dims=dim("embed", self.hidden_size), eps=self.layer_norm_eps)

    @cached_property
    def blocks(self) -> tuple[VisionBlockConfig, ...]:
        """The layers."""
        width, std = self.hidden_size, self.initializer_range
        heads, bias = self.num_attention_heads, self.qkv_bias
        block = VisionBlockConfig(
            norm=self._layer_norm,
            attention=PieceAttentionConfig(
                embed=width, heads=heads, head_dim=self.head_dim, bias=bias, std=std
            ),
            mlp=VisionMLPConfig(embed=width, mlp=self.intermediate_size, std=std),
            layer_scale=self.layer_scale,
        )
        return (block,) * self.num_hidden_layers

    @property
    def norm(self) -> LayerNormConfig | None:
        """The norm after the last layer, if there is one."""
        return self._layer_norm if self.final_norm else None

    @property
    def feature_width(self) -> int:
        """The patches of a block, side by side."""
        return self.hidden_size * self.merge**2

    @property
    def skip(self) -> int:
        """The prefix."""
        return self.prefix

    @property
    def grain(self) -> int:
        """Patches of a block."""
        return self.merge**2

    @property
    def together(self) -> bool:
        """Which rows of a video are dropped depends on all of them."""
        return self.pruning > 0

    def rows(self, size: tuple[int, ...]) -> int:
        """Prefix and patches."""
        _, rows, cols = size
        return self.prefix + rows * cols

    def outputs(self, size: tuple[int, ...]) -> int:
        """One for each block of patches."""
        _, rows, cols = size
        return rows * cols // self.merge**2

    def order(self, rows: int, cols: int) -> NDArray[np.int64]:
        """Block order: for each place of a patch in its sequence, its row-major number in the grid.

        Blocks of ``merge`` x ``merge`` patches are row-major, and so are the patches inside a block.

        Raises:
            ValueError: blocks do not divide the grid.
        """
        side = self.merge
        if rows % side or cols % side:
            raise ValueError(f"a grid of {rows} x {cols} patches is not made of blocks of {side} x {side}")
        grid = np.arange(rows * cols, dtype=np.int64).reshape(rows // side, side, cols // side, side)
        return grid.transpose(0, 2, 1, 3).reshape(-1)


def kept(groups: int, cells: int, pruning: float) -> int:
    """Rows that efficient video sampling (arXiv 2604.24954) keeps of ``groups`` x ``cells``.

    At least one group's, so that the first is always whole.
    """
    return max(cells, int(groups * cells * (1 - pruning)))
