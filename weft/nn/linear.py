"""Linear layers, norms and the token table."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from weft.nn.context import Context
from weft.nn.module import Layer
from weft.nn.slots import Lookup, Loss, Product, Total
from weft.ops.linear import linear
from weft.ops.norm import gated_group_norm, normalize, rms_norm, sum_of_squares
from weft.spec.hybrid import EmbeddingConfig
from weft.spec.layers import LayerNormConfig, LinearConfig, NormConfig


class Linear(Layer):
    """``y = x W^T``, plus a bias where the config has one."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        if not config.bias:
            self.bias = None
        self.own(config.params())
        self.product = Product()

    def forward(self, x: Float[Tensor, "read cols"], ctx: Context) -> Float[Tensor, "written rows"]:
        """Project; a layout may also change which tokens and features are here."""
        y = self.product(x, self.weight, ctx.segments.tokens)
        return y if self.bias is None else y + self.bias


class RMSNorm(Layer):
    """Root-mean-square norm (Zhang and Sennrich 2019)."""

    weight: Tensor

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.config = config
        self.own(config.params())
        self.total = Total("features", config.group)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """``x / rms(x) * weight``."""
        if self.total.alone:
            return rms_norm(x, self.weight, self.config.eps)
        return self._over_ranks(x)

    def _over_ranks(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """The norm where other ranks have the rest of each group."""
        squares = sum_of_squares(x, self.config.group)
        return normalize(x, self.total(squares), self.config.group, self.weight, self.config.eps)


class LayerNorm(Layer):
    """Norm with mean and bias (Ba et al. 2016, arXiv 1607.06450)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: LayerNormConfig) -> None:
        super().__init__()
        self.config = config
        self.own(config.params())

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """``(x - mean) / std * weight + bias``."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.config.eps)


class GatedGroupNorm(RMSNorm):
    """Mamba-2's norm: ``y * silu(z)`` normalized in groups of channels (gate before norm)."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, y: Float[Tensor, "tokens dim"], z: Float[Tensor, "tokens dim"]
    ) -> Float[Tensor, "tokens dim"]:
        """Gate, then normalize."""
        if self.total.alone:
            return gated_group_norm(y, z, self.weight, self.config.group, self.config.eps)
        wide = torch.promote_types(y.dtype, torch.float32)
        return self._over_ranks(y.to(wide) * F.silu(z.to(wide))).to(y.dtype)


class Embedding(Layer):
    """Token table."""

    weight: Tensor
    needs_weight_in_backward = False

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.own(config.params())
        self.lookup = Lookup()

    def forward(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "rows embed"]:
        """Rows of the table; a negative id (no token there) gives zeros."""
        return self.lookup(ids, self.weight)


class Head(Layer):
    """Output head: logits, or their loss in chunks."""

    weight: Tensor
    needs_weight_in_backward = False  # the loss forms its gradients in the forward pass

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.own(config.params())
        self.loss = Loss()

    def forward(
        self,
        states: Sequence[Float[Tensor, "rows embed"]],
        targets: Int[Tensor, "depths tokens"],
        scales: Sequence[float],
        chunk: int,
    ) -> list[Float[Tensor, ""]]:
        """``scales[k]`` times the summed loss of ``states[k]`` on ``targets[k]`` (negative: none there).

        All depths are one call because their gradients add up in the dtype of logits: fp32 under reduced
        precision. Summing them in bf16 made Nemotron 3 Ultra diverge late in pretraining.
        """
        wide = self.weight.float() if self.weight.dtype == torch.bfloat16 else self.weight
        return [self.loss(state, wide, targets[k], scales[k], chunk) for k, state in enumerate(states)]

    def best(
        self, state: Float[Tensor, "rows embed"], targets: Int[Tensor, " tokens"], chunk: int
    ) -> Int[Tensor, " rows"]:
        """The most likely token after each row here; ``targets`` are those of the whole run of tokens."""
        return self.loss.best(state, self.weight, targets, chunk)

    def logits(self, hidden: Float[Tensor, "tokens embed"]) -> Float[Tensor, "tokens vocab"]:
        """Logits, on one device."""
        return linear(hidden, self.weight)
