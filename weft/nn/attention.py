"""Grouped-query attention without positional encoding (Ainslie et al. 2023, arXiv 2305.13245)."""

from jaxtyping import Float
from torch import Tensor

from weft.nn.context import Context, RouterStats
from weft.nn.linear import Linear
from weft.nn.module import Layer
from weft.nn.slots import Attend
from weft.spec.layers import AttentionConfig


class Attention(Layer):
    """Causal attention inside documents."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj, self.o_proj = Linear(config.qkv_proj), Linear(config.o_proj)
        self.attend = Attend()

    def forward(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "tokens embed"], RouterStats | None]:
        """The mixer's output, before the residual sum."""
        c = self.config
        heads = self.qkv_proj(x, ctx).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=-2)
        state, past = (ctx.cache.kv(key), ctx.cache.lengths) if ctx.cache else (None, None)
        y = self.attend(q, k, v, ctx.segments, state, past)
        return self.o_proj(y.flatten(-2), ctx), None
