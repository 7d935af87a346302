"""One residual layer, the unit on which recomputation, stages and stores cut."""

from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weft.nn.attention import Attention
from weft.nn.context import Context, RouterStats
from weft.nn.linear import RMSNorm
from weft.nn.mamba import Mamba
from weft.nn.mlp import MLP
from weft.nn.module import Layer
from weft.nn.moe import MoE
from weft.spec.hybrid import BlockConfig
from weft.spec.layers import AttentionConfig, MambaConfig, MixerConfig, MLPConfig, MoEConfig

_MIXERS: dict[type[MixerConfig], Callable[..., Layer]] = {
    MambaConfig: Mamba,
    AttentionConfig: Attention,
    MLPConfig: MLP,
    MoEConfig: MoE,
}
L = TypeVar("L", bound=Layer)


def builds(config: type[MixerConfig]) -> Callable[[type[L]], type[L]]:
    """Decorator of a layer class: configs of this type make such layers, also outside this package."""

    def register(layer: type[L]) -> type[L]:
        _MIXERS[config] = layer
        return layer

    return register


def make_mixer(config: MixerConfig) -> Layer:
    """The mixer that a config describes."""
    return _MIXERS[type(config)](config)


class Block(Layer):
    """``x + mixer(norm(x))``."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.norm)
        self.mixer = make_mixer(config.mixer)
        self.recompute = False

    def forward(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> Float[Tensor, "tokens embed"]:
        """The residual stream after this layer; router statistics go to ``ctx.stats[key]``."""
        if self.recompute and x.requires_grad:
            x, stats = checkpoint(
                self._run, x, ctx, key, use_reentrant=False, preserve_rng_state=False
            )  # router choices come back from ctx.replay, so nothing is chosen twice
        else:
            x, stats = self._run(x, ctx, key)
        if stats is not None:
            ctx.stats[key] = stats
        return x

    def _run(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "tokens embed"], RouterStats | None]:
        y, stats = self.mixer(self.norm(x), ctx, key)
        return x + y, stats
