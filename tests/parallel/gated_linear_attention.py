"""A layer that Weft does not know: gated linear attention with one fused projection.

``h_t = exp(-dt_t) h_{t-1} + dt_t v_t k_t^T``, ``y_t = norm(h_t q_t, gated by g_t)`` per head (after Yang et
al. 2024, arXiv 2312.06635). It says which dimensions its tensors have and nothing about ranks.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from weft.config.base import setting
from weft.nn.block import builds
from weft.nn.linear import GatedGroupNorm, Linear
from weft.nn.module import Layer
from weft.nn.slots import Scan
from weft.spec.hybrid import HybridConfig
from weft.spec.layers import LinearConfig, MixerConfig, NormConfig
from weft.spec.param import ZEROS, ParamSpec, Part, dim


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(MixerConfig):
    heads: int = setting(doc="heads", ge=1, dim="heads")
    head_dim: int = setting(doc="channels per head", ge=1)

    @property
    def in_proj(self):
        parts = [Part("heads", self.heads, self.head_dim, label) for label in ("q", "k", "v", "gate")]
        rows = (*parts, Part("heads", self.heads, 1, "dt"))
        return LinearConfig(rows=rows, cols=dim("embed", self.embed), std=self.std)

    @property
    def norm(self):
        return NormConfig(dims=dim("heads", self.heads, self.head_dim), eps=1e-5, group=self.head_dim)

    @property
    def out_proj(self):
        cols = dim("heads", self.heads, self.head_dim)
        return LinearConfig(rows=dim("embed", self.embed), cols=cols, std=self.out_std)

    def params(self):
        children = {"in_proj": self.in_proj, "norm": self.norm, "out_proj": self.out_proj}
        own = (ParamSpec("decay", (dim("heads", self.heads),), ZEROS, decay=False),)
        return own + tuple(p.under(name) for name, child in children.items() for p in child.params())

    def flops_per_token(self, context):
        return 2 * self.active() + 4 * self.heads * self.head_dim**2


@builds(GatedLinearAttentionConfig)
class GatedLinearAttention(Layer):
    decay: Tensor

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.in_proj, self.out_proj = Linear(config.in_proj), Linear(config.out_proj)
        self.norm, self.scan = GatedGroupNorm(config.norm), Scan(16)
        self.own(config.params())

    def forward(self, x, ctx, key):
        heads, width = self.config.heads, self.config.head_dim
        *qkvg, dt = self.in_proj(x, ctx).split([heads * width] * 4 + [heads], dim=-1)
        q, k, v = (part.unflatten(-1, (heads, width)) for part in qkvg[:3])
        rate = -self.decay.exp()
        y = self.scan(v, F.softplus(dt), rate, k, q, rate.new_zeros(heads), ctx.segments)
        return self.out_proj(self.norm(y.flatten(-2), qkvg[3]), ctx), None


@dataclass(frozen=True, kw_only=True)
class OutOfTreeConfig(HybridConfig):
    """A hybrid model in which '-' stands for gated linear attention."""

    def mixer(self, symbol):
        if symbol != "-":
            return super().mixer(symbol)
        heads = self.num_attention_heads
        return GatedLinearAttentionConfig(embed=self.hidden_size, heads=heads, head_dim=self.head_dim)
