"""Sound encoders: FastConformer (arXiv 2305.05084), as Parakeet has it, over log-mel frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from weft.config.base import Config, setting
from weft.config.errors import Problem
from weft.spec.encoder import EncoderConfig, PieceAttentionConfig, under
from weft.spec.layers import LayerNormConfig, LinearConfig, NormConfig
from weft.spec.param import ONES, ZEROS, Dim, Init, ParamSpec, Part, dim

TAPS = 3  # of the convolutions that halve the frames; they start one frame before the first


def halved(rows: int) -> int:
    """Rows after a convolution with three taps, stride 2 and one row of padding on both sides."""
    return -(-rows // 2)


@dataclass(frozen=True, kw_only=True)
class SubsamplingConfig(Config):
    """Mel frames -> rows: convolutions over time and mels, each of which halves both, then a projection.

    Nothing of it is cut: each rank makes its own rows.
    """

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    mels: int = setting(doc="mels of a frame", ge=1)
    channels: int = setting(doc="channels of the convolutions", ge=1)
    halvings: int = setting(doc="how often frames and mels are halved", ge=1)
    closing: int = setting(0, "frames at the end of a clip that are masked", ge=0)
    scaled: bool = setting(False, "multiply the rows by the square root of their width")
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    @property
    def linear(self) -> LinearConfig:
        """Channels and mels (mels fastest) to the residual width."""
        cols = dim("channel", self.channels, self.mels >> self.halvings)
        return LinearConfig(rows=dim("embed", self.embed), cols=cols, std=self.std, bias=True)

    def params(self) -> tuple[ParamSpec, ...]:
        """The first convolution; of each further halving a depthwise and a pointwise one; the projection."""
        found = list(self._conv("first", 1, TAPS))
        for i in range(self.halvings - 1):
            found += self._conv(f"stages.{i}.depthwise", 1, TAPS)
            found += self._conv(f"stages.{i}.pointwise", self.channels, 1)
        return (*found, *under(linear=self.linear))

    def spans(self, start: int, stop: int, frames: int) -> tuple[tuple[int, int, int], ...]:
        """What rows ``start`` to ``stop`` depend on: (first, last, length) before each halving and after all.

        ``last`` is the one after, and ``length`` that of the clip there. Frames that close a clip are not
        there, nor is a row of such frames alone.
        """
        lengths = [max(0, frames - self.closing)]
        for _ in range(self.halvings):
            lengths.append(halved(lengths[-1]))
        first, last = min(start, lengths[-1]), min(stop, lengths[-1])
        found = [(first, last, lengths[-1])]
        for length in reversed(lengths[:-1]):
            first, last = (max(0, 2 * first - 1), min(length, 2 * last)) if first < last else (0, 0)
            found.append((first, last, length))
        return tuple(reversed(found))

    def _conv(self, name: str, inputs: int, taps: int) -> Iterator[ParamSpec]:
        """Weight ``[channels, inputs, taps, taps]`` and bias, uniform by the inputs of one output."""
        rows, square = dim("channel", self.channels), (dim("tap", taps), dim("tap", taps))
        draw = Init("uniform", (inputs * taps**2) ** -0.5)
        yield ParamSpec(f"{name}.weight", (rows, dim("inputs", inputs), *square), draw)
        yield ParamSpec(f"{name}.bias", (rows,), draw, decay=False)


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig(Config):
    """``down(silu(up(x)))``."""

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    mlp: int = setting(doc="inner width", ge=1, dim="mlp")
    bias: bool = setting(False, "whether the products have biases")
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    @property
    def up_proj(self) -> LinearConfig:
        """Into the inner width."""
        rows, cols = dim("mlp", self.mlp), dim("embed", self.embed)
        return LinearConfig(rows=rows, cols=cols, std=self.std, bias=self.bias)

    @property
    def down_proj(self) -> LinearConfig:
        """Back to the residual."""
        rows, cols = dim("embed", self.embed), dim("mlp", self.mlp)
        return LinearConfig(rows=rows, cols=cols, std=self.std, bias=self.bias)

    def params(self) -> tuple[ParamSpec, ...]:
        """Up and down projection."""
        return under(up_proj=self.up_proj, down_proj=self.down_proj)


@dataclass(frozen=True, kw_only=True)
class RelativeAttentionConfig(PieceAttentionConfig):
    """Attention whose scores also depend on how far apart rows are (arXiv 1901.02860, 3.3)."""

    positions: int = setting(doc="width of the sinusoids of a distance", ge=2)

    def params(self) -> tuple[ParamSpec, ...]:
        """Projections; that of the sinusoids; what queries get for contents (u) and for distances (v)."""
        heads, normal = dim("heads", self.heads, self.head_dim), Init("normal", self.std)
        per_head = (dim("heads", self.heads), dim("head_dim", self.head_dim))
        return (
            *super().params(),
            ParamSpec("relative.weight", (heads, dim("sinusoids", self.positions)), normal),
            ParamSpec("bias_u", per_head, normal, decay=False),
            ParamSpec("bias_v", per_head, normal, decay=False),
        )


ConvNorm = Literal["batch", "rms"]


@dataclass(frozen=True, kw_only=True)
class RunningNormConfig(Config):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with given statistics (see ``AudioConfig``)."""

    dims: Dim
    eps: float = setting(1e-5, "added to the variance", gt=0)

    def params(self) -> tuple[ParamSpec, ...]:
        """Weight and bias, and the statistics, which nothing changes."""
        return (
            ParamSpec("weight", (self.dims,), ONES, decay=False),
            ParamSpec("bias", (self.dims,), ZEROS, decay=False),
            ParamSpec("mean", (self.dims,), ZEROS, decay=False, fp32=True, buffer=True),
            ParamSpec("var", (self.dims,), ONES, decay=False, fp32=True, buffer=True),
        )


@dataclass(frozen=True, kw_only=True)
class ConvModuleConfig(Config):
    """``down(silu(norm(depthwise(value * sigmoid(gate)))))`` with ``[value | gate] = up(x)``."""

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    channels: int = setting(doc="channels of the convolution", ge=1, dim="mlp")
    kernel: int = setting(doc="its taps", ge=1)
    norm_kind: ConvNorm = setting("batch", "the norm after the convolution")
    norm_group: int = setting(doc="channels of the whole convolution", ge=1)
    bias: bool = setting(True, "whether products and convolution have biases")
    eps: float = setting(1e-5, "norm epsilon", gt=0)
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    @property
    def up_proj(self) -> LinearConfig:
        """Into ``[value | gate]``."""
        rows = tuple(Part("mlp", self.channels, 1, label) for label in ("value", "gate"))
        return LinearConfig(rows=rows, cols=dim("embed", self.embed), std=self.std, bias=self.bias)

    @property
    def norm(self) -> RunningNormConfig | NormConfig:
        """The norm after the convolution."""
        dims = dim("mlp", self.channels)
        if self.norm_kind == "batch":
            return RunningNormConfig(dims=dims, eps=self.eps)
        return NormConfig(dims=dims, eps=self.eps, group=self.norm_group)

    @property
    def down_proj(self) -> LinearConfig:
        """Back to the residual."""
        rows, cols = dim("embed", self.embed), dim("mlp", self.channels)
        return LinearConfig(rows=rows, cols=cols, std=self.std, bias=self.bias)

    def params(self) -> tuple[ParamSpec, ...]:
        """Up, convolution, norm, down."""
        rows, draw = dim("mlp", self.channels), Init("uniform", self.kernel**-0.5)
        conv = [ParamSpec("depthwise.weight", (rows, dim("tap", self.kernel)), draw)]
        if self.bias:
            conv.append(ParamSpec("depthwise.bias", (rows,), draw, decay=False))
        return (*under(up_proj=self.up_proj), *conv, *under(norm=self.norm, down_proj=self.down_proj))


@dataclass(frozen=True, kw_only=True)
class ConformerConfig(Config):
    """One layer: half a feed-forward, attention, convolution, half a feed-forward, a norm."""

    norm: LayerNormConfig
    feed: FeedForwardConfig
    attention: RelativeAttentionConfig
    conv: ConvModuleConfig

    def params(self) -> tuple[ParamSpec, ...]:
        """Each branch after its norm, then the norm of the sum."""
        return (
            *under(norm_feed1=self.norm, feed1=self.feed),
            *under(norm_attention=self.norm, attention=self.attention),
            *under(norm_conv=self.norm, conv=self.conv),
            *under(norm_feed2=self.norm, feed2=self.feed),
            *under(norm_out=self.norm),
        )


@dataclass(frozen=True, kw_only=True)
class AudioConfig(EncoderConfig):
    """A FastConformer over log-mel frames; the size of a sequence is (frames of the clip,).

    The norm of the convolution is ``batch``: an affine map per channel with the statistics that a checkpoint
    has (mean 0 and variance 1 in a new model). They are constants, in training too: what a clip gives never
    depends on what is computed beside it. Or ``rms``: root mean square over the channels of each row.

    The last ``closing`` frames of a clip hold no sound. They count for its rows, but nothing reads them, and
    a row of such frames alone is read by no other; it sees all rows alike.
    """

    kind: Literal["audio"] = setting("audio", "what the encoder reads")
    sample_rate: int = setting(16000, "samples per second", ge=1)
    mels: int = setting(128, "mels of a frame", ge=1)
    window: int = setting(400, "samples that a frame sees", ge=2)
    hop: int = setting(160, "samples between frames", ge=1)
    fft: int = setting(512, "samples of the Fourier transform of a frame", ge=2)
    preemphasis: float = setting(0.97, "part of a sample that is taken from the next", ge=0, lt=1)
    closing: int = setting(1, "frames at the end of a clip that are masked", ge=0, le=1)
    subsampling: int = setting(8, "frames per row; a power of two", ge=2)
    subsampling_channels: int = setting(256, "channels of the convolutions that make rows", ge=1)
    scale_input: bool = setting(False, "multiply the first rows by the square root of their width")
    attention_bias: bool = setting(False, "whether attention and feed-forward have biases")
    conv_kernel: int = setting(9, "taps of the convolution in a layer; an odd number", ge=1)
    conv_bias: bool = setting(True, "whether the products and the convolution of that branch have biases")
    conv_norm: ConvNorm = setting("batch", "the norm after that convolution: batch (running) or rms")

    def check(self) -> Iterator[Problem]:
        """Halvings come out even; windows fit."""
        yield from super().check()
        if self.subsampling & (self.subsampling - 1):
            yield Problem("subsampling", f"{self.subsampling} is not a power of two; take 4 or 8")
        elif self.mels % self.subsampling:
            message = f"{self.mels} mels are not divided by subsampling = {self.subsampling}"
            yield Problem("mels", message)
        if self.conv_kernel % 2 == 0:
            message = f"{self.conv_kernel} taps have no middle; take {self.conv_kernel + 1}"
            yield Problem("conv_kernel", message)
        if self.hidden_size % 2:
            yield Problem("hidden_size", f"{self.hidden_size} is odd; distances are sines and cosines")
        if self.window > self.fft:
            message = f"{self.window} samples do not fit a transform of fft = {self.fft}"
            yield Problem("window", message)

    @property
    def halvings(self) -> int:
        """How often frames are halved."""
        return self.subsampling.bit_length() - 1

    @property
    def embed(self) -> SubsamplingConfig:
        """Frames to rows."""
        return SubsamplingConfig(
            embed=self.hidden_size,
            mels=self.mels,
            channels=self.subsampling_channels,
            halvings=self.halvings,
            closing=self.closing,
            scaled=self.scale_input,
            std=self.initializer_range,
        )

    @cached_property
    def blocks(self) -> tuple[ConformerConfig, ...]:
        """The layers."""
        width, std = self.hidden_size, self.initializer_range
        block = ConformerConfig(
            norm=LayerNormConfig(dims=dim("embed", width), eps=self.layer_norm_eps),
            feed=FeedForwardConfig(
                embed=width, mlp=self.intermediate_size, bias=self.attention_bias, std=std
            ),
            attention=RelativeAttentionConfig(
                embed=width,
                heads=self.num_attention_heads,
                head_dim=self.head_dim,
                bias=self.attention_bias,
                out_bias=self.attention_bias,
                positions=width,
                std=std,
            ),
            conv=ConvModuleConfig(
                embed=width,
                channels=width,
                kernel=self.conv_kernel,
                norm_kind=self.conv_norm,
                norm_group=width,
                bias=self.conv_bias,
                eps=self.layer_norm_eps,
                std=std,
            ),
        )
        return (block,) * self.num_hidden_layers

    def mel_frames(self, samples: int) -> int:
        """Frames of a clip of so many samples, with the one that closes it."""
        return 1 + samples // self.hop

    def rows(self, size: tuple[int, ...]) -> int:
        """Rows of a clip: its frames, halved again and again."""
        return self._halved(size[0])

    def reads(self, start: int, stop: int, size: tuple[int, ...]) -> tuple[int, int]:
        """The frames that rows ``start`` to ``stop`` depend on."""
        return self.frames(start, stop, size)

    def outputs(self, size: tuple[int, ...]) -> int:
        """As many as rows."""
        return self.rows(size)

    def heard(self, size: tuple[int, ...]) -> int:
        """Rows that see frames before those that close the clip: all, or all but the last."""
        return self._halved(max(0, size[0] - self.closing))

    def _halved(self, rows: int) -> int:
        for _ in range(self.halvings):
            rows = halved(rows)
        return rows

    def frames(self, start: int, stop: int, size: tuple[int, ...]) -> tuple[int, int]:
        """Frames of a clip, from and up to, that its rows ``start`` to ``stop`` depend on."""
        return self.embed.spans(start, stop, size[0])[0][:2]

    def flops(self, rows: int) -> float:
        """As in any encoder, plus a projection of ``2 * rows`` distances and a score for each of them."""
        distances = 2.0 * rows * self.hidden_size * (2.0 * rows + self.hidden_size)
        return super().flops(rows) + distances * self.num_hidden_layers
