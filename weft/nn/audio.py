"""FastConformer layers (arXiv 2305.05084), on the flat rows of an encoder's pieces."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.nn.context import Context
from weft.nn.encoder import EncoderBlock, PieceAttention, pieces_of
from weft.nn.linear import LayerNorm, Linear, RMSNorm
from weft.nn.module import Layer, Part
from weft.nn.slots import Halo
from weft.ops.attention import attend_pieces
from weft.ops.conv import depthwise
from weft.ops.linear import linear
from weft.plan.items import Piece, Pieces, Size
from weft.spec.audio import (
    ConformerConfig,
    ConvModuleConfig,
    FeedForwardConfig,
    RelativeAttentionConfig,
    RunningNormConfig,
    SubsamplingConfig,
)
from weft.spec.layers import NormConfig

Heard = Callable[[Size], int]
LONGEST = 10000.0  # wave of the sinusoids of a distance, over 2 pi


class Subsampling(Layer):
    """Mel frames -> rows. A piece's rows come from the frames that they depend on, and from no others."""

    first: Part
    linear: Part

    def __init__(self, config: SubsamplingConfig) -> None:
        super().__init__()
        self.config = config
        self.own(config.params())

    def forward(
        self, data: Sequence[Float[Tensor, "_ mels"]], pieces: Sequence[Piece], sizes: Sequence[Size]
    ) -> Float[Tensor, "rows embed"]:
        """Rows of the pieces.

        Args:
            data: frames of each piece, those that ``config.spans`` begins with.
            pieces: which rows of which clips.
            sizes: of all clips of the pass.

        Raises:
            ValueError: a tensor has other frames than its piece needs.
        """
        c = self.config
        none = self.first.weight.new_zeros(0, 1, 2**c.halvings, c.mels)
        features = [self._features(none, c.spans(0, 1, 2**c.halvings + c.closing)).flatten(0, 1)]
        features += [self._piece(x, p, sizes[p.sequence][0]) for x, p in zip(data, pieces, strict=True)]
        x = linear(torch.cat(features), self.linear.weight) + self.linear.bias
        return x * c.embed**0.5 if c.scaled else x

    def _piece(self, x: Tensor, piece: Piece, frames: int) -> Tensor:
        """``[rows, channels * mels]``; zeros for a row of frames that are masked."""
        spans = self.config.spans(piece.start, piece.stop, frames)
        first, last, _ = spans[0]
        if len(x) != last - first:
            wanted = f"frames {first} to {last} of {frames}"
            raise ValueError(f"rows {piece.start} to {piece.stop} need {wanted}, but {len(x)} were given")
        if not len(x):
            return x.new_zeros(piece.rows, self.linear.weight.shape[1], dtype=self.linear.weight.dtype)
        features = self._features(x.to(self.first.weight.dtype)[None, None], spans).squeeze(0)
        return F.pad(features, (0, 0, 0, piece.rows - len(features)))

    def _features(self, x: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """``[clips, 1, frames, mels]`` -> ``[clips, rows, channels * mels]``."""
        for i, ((first, last, _), (start, stop, _)) in enumerate(zip(spans, spans[1:], strict=False)):
            x = F.pad(x, (1, 1, first - (2 * start - 1), 2 * stop - last))
            if i == 0:
                x = F.conv2d(x, self.first.weight, self.first.bias, stride=2).relu()
                continue
            own, mixed = (self._stage(i - 1, name) for name in ("depthwise", "pointwise"))
            x = F.conv2d(x, own.weight, own.bias, stride=2, groups=x.shape[1])
            x = F.conv2d(x, mixed.weight, mixed.bias).relu()
        return x.transpose(1, 2).flatten(2)

    def _stage(self, i: int, name: str) -> Part:
        return cast(Part, self.get_submodule(f"stages.{i}.{name}"))


class FeedForward(Layer):
    """``down(silu(up(x)))``."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Linear(config.up_proj), Linear(config.down_proj)

    def forward(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The branch, before the residual sum."""
        return self.down_proj(F.silu(self.up_proj(x, ctx)), ctx)


def sinusoids(
    highest: int, count: int, width: int, like: Float[Tensor, "..."]
) -> Float[Tensor, "count width"]:
    """Sine and cosine, in turn, of the distances ``highest``, ``highest - 1`` and so on.

    Angles are rounded to fp32 whatever the dtype of ``like``, as published models were trained.
    """
    wide = {"device": like.device, "dtype": torch.float32}
    frequency = 1.0 / (LONGEST ** (torch.arange(0, width, 2, **wide) / width))
    angles = torch.arange(highest, highest - count, -1, **wide)[:, None] * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(like.dtype)


class RelativeAttention(PieceAttention):
    """Attention with Transformer-XL's distances (arXiv 1901.02860, 3.3).

    The score of row i for row j is ``(q_i + u) k_j + (q_i + v) r_(i-j)``, over the root of ``head_dim``,
    where r is a projection of the sinusoids of the distance.
    """

    bias_u: Tensor
    bias_v: Tensor
    relative: Part

    def __init__(self, config: RelativeAttentionConfig, heard: Heard) -> None:
        super().__init__(config)
        self.heard = heard
        self.own(config.params())

    def forward(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The branch, before the residual sum."""
        c, pieces = self.config, pieces_of(ctx)
        q, others = (
            self.qkv_proj(x, ctx).unflatten(-1, (-1, c.head_dim)).split([c.heads, 2 * c.heads], dim=-2)
        )
        k, v = self.halo(others, pieces).chunk(2, dim=-2)
        scale = c.head_dim**-0.5
        distances = _Distances((q + self.bias_v) * scale, self.relative.weight, pieces, self.heard)
        y = attend_pieces(q + self.bias_u, k, v, pieces.here, scale, distances)
        return self.o_proj(y.flatten(-2), ctx)


class _Distances:
    """Scores of the queries of pieces for distances; calling it has no effects, so it may be called again."""

    def __init__(
        self,
        q: Float[Tensor, "rows heads head_dim"],
        weight: Float[Tensor, "inner positions"],
        pieces: Pieces,
        heard: Heard,
    ) -> None:
        self.pieces = pieces.here
        self.heard = [heard(pieces.sizes[piece.sequence]) for piece in self.pieces]
        self.q = q.split(pieces.lengths)
        self.highest = max((piece.stop - 1 for piece in self.pieces), default=0)
        lowest = min((piece.start - piece.whole for piece in self.pieces), default=0)
        table = sinusoids(self.highest, self.highest + 1 - lowest, weight.shape[1], weight)
        self.keys = F.linear(table, weight).unflatten(-1, q.shape[1:])

    def __call__(self, i: int, rows: slice) -> Float[Tensor, "heads queries keys"]:
        piece, q = self.pieces[i], self.q[i][rows]
        first, whole, count = piece.start + rows.start, piece.whole, len(q)
        # One distance more than there are: then row r of the scores, moved left by count - 1 - r, begins
        # after r * (count + whole - 1) numbers, and all rows together are a view.
        top = self.highest - (first + count - 1)
        scores = torch.einsum("ihd,phd->hip", q, self.keys[top : top + count + whole])
        pitch = count + whole - 1
        moved = scores.flatten(1)[:, count - 1 : count - 1 + count * pitch]
        near = moved.unflatten(1, (count, pitch))[..., :whole]
        if self.heard[i] == whole:
            return near
        masked = torch.arange(whole, device=q.device) >= self.heard[i]
        # The least number plus a score is the least number: a masked query sees all keys alike.
        return near.masked_fill(masked[first : first + count, None] | masked, torch.finfo(q.dtype).min)


class RunningNorm(Layer):
    """Batch norm with given statistics: an affine map per channel."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, config: RunningNormConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.own(config.params())

    def folded(
        self, taps: Float[Tensor, "channels taps"], bias: Float[Tensor, " channels"] | None
    ) -> tuple[Float[Tensor, "channels taps"], Float[Tensor, " channels"]]:
        """The convolution before it and this norm as one convolution, in the dtype of the statistics."""
        factor = self.weight * (self.var + self.eps).rsqrt()
        middle = self.mean if bias is None else self.mean - bias
        return taps * factor[:, None], self.bias - middle * factor


class ConvModule(Layer):
    """``down(silu(norm(depthwise(value * sigmoid(gate)))))`` with ``[value | gate] = up(x)``."""

    depthwise: Part
    norm: RunningNorm | RMSNorm

    def __init__(self, config: ConvModuleConfig, heard: Heard) -> None:
        super().__init__()
        self.config, self.heard = config, heard
        self.up_proj, self.down_proj = Linear(config.up_proj), Linear(config.down_proj)
        norm = config.norm
        self.norm = RMSNorm(norm) if isinstance(norm, NormConfig) else RunningNorm(norm)
        self.own(config.params())
        self.halo = Halo(config.kernel // 2)

    def forward(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The branch, before the residual sum."""
        pieces = pieces_of(ctx)
        gated = self._without_unheard(F.glu(self.up_proj(x, ctx)), pieces)
        around = self.halo(gated, pieces)
        taps, bias = self.depthwise.weight, self.depthwise.bias if self.config.bias else None
        if isinstance(self.norm, RunningNorm):
            y = depthwise(around, *self.norm.folded(taps, bias), pieces.here)
        else:
            y = self.norm(depthwise(around, taps, bias, pieces.here))
        return self.down_proj(F.silu(y), ctx)

    def _without_unheard(self, x: Tensor, pieces: Pieces) -> Tensor:
        """Zeros for rows of masked frames."""
        last = [min(p.stop, self.heard(pieces.sizes[p.sequence])) - p.start for p in pieces.here]
        if tuple(last) == pieces.lengths:
            return x
        parts = zip(x.split(pieces.lengths), last, strict=True)
        return torch.cat([F.pad(own[: max(n, 0)], (0, 0, 0, len(own) - max(n, 0))) for own, n in parts])


class Conformer(EncoderBlock):
    """One layer: half a feed-forward, attention, convolution, half a feed-forward, a norm.

    Args:
        config: sizes, as one rank computes it.
        heard: of the size of a clip, its rows that are not of masked frames alone.
    """

    def __init__(self, config: ConformerConfig, heard: Heard) -> None:
        super().__init__()
        norm = config.norm
        self.norm_feed1, self.feed1 = LayerNorm(norm), FeedForward(config.feed)
        self.norm_attention, self.attention = LayerNorm(norm), RelativeAttention(config.attention, heard)
        self.norm_conv, self.conv = LayerNorm(norm), ConvModule(config.conv, heard)
        self.norm_feed2, self.feed2 = LayerNorm(norm), FeedForward(config.feed)
        self.norm_out = LayerNorm(norm)

    def run(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The rows after this layer."""
        x = x + 0.5 * self.feed1(self.norm_feed1(x), ctx)
        x = x + self.attention(self.norm_attention(x), ctx)
        x = x + self.conv(self.norm_conv(x), ctx)
        return self.norm_out(x + 0.5 * self.feed2(self.norm_feed2(x), ctx))
