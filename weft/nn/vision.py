"""Layers of a vision transformer in the C-RADIO form (arXiv 2412.07679)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.nn.context import Context
from weft.nn.encoder import EncoderBlock, PieceAttention
from weft.nn.linear import LayerNorm, Linear
from weft.nn.module import Layer, Part
from weft.ops.linear import linear
from weft.plan.items import Piece, Size
from weft.spec.vision import PatchesConfig, VisionBlockConfig, VisionMLPConfig


class Patches(Layer):
    """Patches to rows: one projection for pictures, one for groups of frames; positions; rows before them."""

    image: Part
    video: Part
    position: Tensor
    prefix: Tensor

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config = config
        self.own(config.params())

    def forward(
        self, data: Sequence[Float[Tensor, "_ _"]], pieces: Sequence[Piece], sizes: Sequence[Size]
    ) -> Float[Tensor, "rows embed"]:
        """Rows of the pieces.

        Args:
            data: patches of each piece, in block order; of a piece with prefix rows only, none.
            pieces: which rows of which sequences.
            sizes: of all sequences of the pass.
        """
        skip = self.config.prefix
        projected, out = self._project(data, [sizes[piece.sequence][0] for piece in pieces])
        grids = {size: self.grid(*size) for size in {sizes[piece.sequence][1:] for piece in pieces}}
        for piece, patches in zip(pieces, projected, strict=True):
            places = slice(max(piece.start - skip, 0), max(piece.stop - skip, 0))
            out.append(self.prefix[piece.start : min(piece.stop, skip)])
            out.append(patches + grids[sizes[piece.sequence][1:]][places])
        return torch.cat(out)

    def _project(self, data: Sequence[Tensor], frames: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Patches of each piece, projected; and no rows, but a gradient (zero at least) for every tensor."""
        projected, none = list(data), [self.prefix[:0] + self.position[:0]]
        for part in (self.image, self.video) if self.config.frames else (self.image,):
            chosen = [i for i, n in enumerate(frames) if (n > 1) == (part is not self.image)]
            given = [part.weight.new_empty(0, part.weight.shape[1])]
            y = linear(torch.cat(given + [data[i].to(part.weight.dtype) for i in chosen]), part.weight)
            for i, rows in zip(chosen, y.split([len(data[i]) for i in chosen]), strict=True):
                projected[i] = rows
            none.append(y[:0])
        return projected, none

    def grid(self, rows: int, cols: int) -> Float[Tensor, "patches embed"]:
        """Positions of a grid, in block order.

        The table is resized to a square whose side is the longer one, of which the upper left part is used
        (cropped position embedding). Resizing is bilinear and written as two products, whose gradients have
        one order of summation on every device.
        """
        side, merge = self.config.max_grid, self.config.merge
        wide = self.position.to(torch.promote_types(self.position.dtype, torch.float32))
        weights = _bilinear(max(rows, cols), side, wide)
        resized = (weights[:rows] @ wide.view(side, -1)).view(rows, side, -1)
        found = (weights[:cols] @ resized).view(rows // merge, merge, cols // merge, merge, -1)
        return found.transpose(1, 2).flatten(0, 3).to(self.position.dtype)


def _bilinear(new: int, old: int, like: Tensor) -> Float[Tensor, "new old"]:
    """What each of ``new`` points takes of ``old`` ones; points are the middles of equal parts of a line."""
    points = torch.arange(new, device=like.device, dtype=like.dtype)
    at = ((points + 0.5) * (old / new) - 0.5).clamp_min(0)
    low = at.floor()
    share = (at - low).unsqueeze(1)
    below = F.one_hot(low.long(), old).to(like.dtype)
    above = F.one_hot((low.long() + 1).clamp_max(old - 1), old).to(like.dtype)
    return below * (1 - share) + above * share


class VisionMLP(Layer):
    """``down(gelu(up(x)))``."""

    def __init__(self, config: VisionMLPConfig) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Linear(config.up_proj), Linear(config.down_proj)

    def forward(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """Before the residual sum."""
        return self.down_proj(F.gelu(self.up_proj(x, ctx)), ctx)


class VisionBlock(EncoderBlock):
    """Attention, then the MLP, each after a norm and before an optional factor per channel."""

    scale1: Tensor | None
    scale2: Tensor | None

    def __init__(self, config: VisionBlockConfig) -> None:
        super().__init__()
        self.norm1, self.attention = LayerNorm(config.norm), PieceAttention(config.attention)
        self.norm2, self.mlp = LayerNorm(config.norm), VisionMLP(config.mlp)
        if not config.layer_scale:
            self.scale1 = self.scale2 = None
        self.own(config.scales)

    def run(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The residual stream after both."""
        x = x + _scaled(self.attention(self.norm1(x), ctx), self.scale1)
        return x + _scaled(self.mlp(self.norm2(x), ctx), self.scale2)


def _scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    return y if scale is None else y * scale
