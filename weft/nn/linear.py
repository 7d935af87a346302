"""Linear layers, norms and the token table."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.nn.module import Layer
from weft.nn.slots import Lookup, Loss
from weft.ops.linear import linear
from weft.ops.norm import gated_group_norm, rms_norm
from weft.spec.hybrid import EmbeddingConfig
from weft.spec.layers import LinearConfig, NormConfig


class Linear(Layer):
    """``y = x W^T``."""

    weight: Tensor

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.own(config.params())

    def forward(self, x: Float[Tensor, "tokens cols"]) -> Float[Tensor, "tokens rows"]:
        """Project."""
        return linear(x, self.weight)


class RMSNorm(Layer):
    """Root-mean-square norm (Zhang and Sennrich 2019)."""

    weight: Tensor

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.config = config
        self.own(config.params())

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """``x / rms(x) * weight``."""
        return rms_norm(x, self.weight, self.config.eps)


class GatedGroupNorm(RMSNorm):
    """Mamba-2's norm: ``y * silu(z)`` normalized in groups of channels (gate before norm)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, y: Float[Tensor, "tokens dim"], z: Float[Tensor, "tokens dim"]
    ) -> Float[Tensor, "tokens dim"]:
        """Gate, then normalize."""
        return gated_group_norm(y, z, self.weight, self.config.group, self.config.eps)


class Embedding(Layer):
    """Token table."""

    weight: Tensor

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.own(config.params())
        self.lookup = Lookup()

    def forward(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens embed"]:
        """Rows of the table; a negative id (no token there) gives zeros."""
        rows = self.lookup(ids.clamp_min(0), self.weight)
        return rows.masked_fill((ids < 0).unsqueeze(-1), 0.0)


class Head(Layer):
    """Output head: logits, or their loss in chunks."""

    weight: Tensor

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.own(config.params())
        self.loss = Loss()

    def wide_weight(self) -> Float[Tensor, "vocab embed"]:
        """The matrix in the dtype of logits: fp32 under reduced precision.

        Summing the output layer's gradient in bf16 made Nemotron 3 Ultra diverge late in pretraining.
        """
        return self.weight.float() if self.weight.dtype == torch.bfloat16 else self.weight

    def forward(self, hidden: Float[Tensor, "tokens embed"]) -> Float[Tensor, "tokens vocab"]:
        """Logits."""
        return linear(hidden, self.weight)
