"""Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060)."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.nn.context import Context, RouterStats
from weft.nn.linear import GatedGroupNorm, Linear
from weft.nn.module import Layer, Part
from weft.nn.slots import Halo, Scan
from weft.spec.layers import MambaConfig
from weft.spec.param import size


class Mamba(Layer):
    """Fused projection, depthwise convolution, scan, gated group norm, projection."""

    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    conv: Part

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj, self.out_proj = Linear(config.in_proj), Linear(config.out_proj)
        self.norm = GatedGroupNorm(config.norm)
        self.own(config.params())
        self.halo, self.scan = Halo(), Scan(config.chunk)

    def forward(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "tokens embed"], RouterStats | None]:
        """The mixer's output, before the residual sum."""
        c = self.config
        z, xBC, dt = self.in_proj(x, ctx).split([c.inner, size(c.conv_rows), c.heads], dim=-1)
        state = ctx.cache.mamba(key) if ctx.cache else None
        xBC = self.halo(xBC, self.conv.weight, self.conv.bias, ctx.segments, state)
        u, B, C = xBC.split([c.inner, c.groups * c.state, c.groups * c.state], dim=-1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias).clamp(*c.dt_limit)
        y = self.scan(
            u.unflatten(-1, (c.heads, c.head_dim)),
            dt,
            -self.A_log.exp(),
            B.unflatten(-1, (c.groups, c.state)),
            C.unflatten(-1, (c.groups, c.state)),
            self.D,
            ctx.segments,
            state,
        )
        y = self.norm(y.flatten(-2), z)
        return self.out_proj(y, ctx), None
