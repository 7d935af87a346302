"""Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060)."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.nn.context import Context, RouterStats
from weft.nn.linear import GatedGroupNorm, Linear
from weft.nn.module import Layer, Part
from weft.nn.slots import Conv, ConvScan
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
        self.scan = ConvScan(config.chunk)

    def forward(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "tokens embed"], RouterStats | None]:
        """The mixer's output, before the residual sum."""
        c = self.config
        z, xBC, dt = self.in_proj(x, ctx).split([c.inner, size(c.conv_rows), c.heads], dim=-1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias).clamp(*c.dt_limit)
        conv, sizes = Conv(self.conv.weight, self.conv.bias), (c.groups, c.state)
        state = ctx.cache.mamba(key) if ctx.cache else None
        y = self.scan(xBC, conv, dt, -self.A_log.exp(), self.D, sizes, ctx.segments, state)
        y = self.norm(y.flatten(-2), z)
        return self.out_proj(y, ctx), None
