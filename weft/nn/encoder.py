"""What encoders share: attention inside sequences, residual layers that may be recomputed, the projector."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.nn.context import Context
from weft.nn.linear import Linear, RMSNorm
from weft.nn.module import Layer, Part
from weft.nn.slots import Halo
from weft.ops.attention import attend_pieces
from weft.ops.linear import linear
from weft.ops.mlp import mlp
from weft.plan.items import Pieces
from weft.spec.encoder import PieceAttentionConfig, ProjectorConfig


def pieces_of(ctx: Context) -> Pieces:
    """What the pass computes.

    Raises:
        ValueError: the pass is not one of an encoder.
    """
    if ctx.pieces is None:
        raise ValueError("an encoder's pass needs Context(..., pieces=Pieces(...))")
    return ctx.pieces


class EncoderBlock(Layer):
    """A residual layer; subclasses say what it is in ``run``."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def forward(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The residual stream after this layer."""
        if self.recompute and x.requires_grad:
            return checkpoint(self.run, x, ctx, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, ctx)

    def run(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The mathematics."""
        raise NotImplementedError


class PieceAttention(Layer):
    """Every row sees all rows of its sequence; no positions."""

    def __init__(self, config: PieceAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj, self.o_proj = Linear(config.qkv_proj), Linear(config.o_proj)
        self.halo = Halo()

    def forward(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "rows embed"]:
        """Before the residual sum."""
        c, pieces = self.config, pieces_of(ctx)
        heads = self.qkv_proj(x, ctx).unflatten(-1, (-1, c.head_dim))
        q, others = heads.split([c.heads, 2 * c.heads], dim=-2)
        k, v = self.halo(others, pieces).chunk(2, dim=-2)
        y = attend_pieces(q, k, v, pieces.here, c.head_dim**-0.5)
        return self.o_proj(y.flatten(-2), ctx)


class Projector(Layer):
    """Features of an encoder -> residual rows of the decoder: ``down(relu(up(norm(x)))^2)``."""

    up: Part
    down: Part

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.norm)
        self.own(config.params())

    def forward(self, x: Float[Tensor, "rows feature"]) -> Float[Tensor, "rows output"]:
        """Row by row: no layout changes it."""
        x = self.norm(x)
        if not self.config.bias:
            return mlp(x, self.up.weight, self.down.weight)
        inner = F.relu(linear(x, self.up.weight) + self.up.bias).square()
        return linear(inner, self.down.weight) + self.down.bias
