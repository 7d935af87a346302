"""Squared-ReLU MLP (So et al. 2021, arXiv 2109.08668)."""

from jaxtyping import Float
from torch import Tensor

from weft.nn.context import Context, RouterStats
from weft.nn.linear import Linear
from weft.nn.module import Layer
from weft.ops.mlp import mlp
from weft.spec.layers import MLPConfig


class MLP(Layer):
    """``down(relu(up(x))^2)``."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Linear(config.up_proj), Linear(config.down_proj)

    def forward(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "tokens embed"], RouterStats | None]:
        """The mixer's output, before the residual sum."""
        return self.apply_to(x, ctx), None

    def apply_to(self, x: Float[Tensor, "tokens embed"], ctx: Context) -> Float[Tensor, "tokens embed"]:
        """The mathematics alone, for the shared expert of a mixture."""
        if self.up_proj.product.alone and self.down_proj.product.alone:
            return mlp(x, self.up_proj.weight, self.down_proj.weight)
        return self.down(self.up(x, ctx), ctx)

    def up(self, x: Float[Tensor, "read embed"], ctx: Context) -> Float[Tensor, "tokens inner"]:
        """The first product."""
        return self.up_proj(x, ctx)

    def down(self, inner: Float[Tensor, "tokens inner"], ctx: Context) -> Float[Tensor, "written embed"]:
        """Activation and second product."""
        return self.down_proj(inner.relu().square(), ctx)
