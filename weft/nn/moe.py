"""Mixture of experts with a shared expert and optional latent width (Nemotron 3, arXiv 2512.20856)."""

from jaxtyping import Float
from torch import Tensor

from weft.nn.context import Context, RouterStats
from weft.nn.linear import Linear
from weft.nn.mlp import MLP
from weft.nn.module import Layer, Part
from weft.nn.router import Router
from weft.nn.slots import Enter, Exchange, Leave
from weft.ops.experts import expert_mlp
from weft.spec.layers import MoEConfig


class MoE(Layer):
    """``up(sum_k w_k expert_k(down(x))) + shared(x)``; without ``latent``, up and down are absent."""

    experts: Part

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config.router)
        self.shared = MLP(config.shared) if config.shared_mlp else None
        self.latent_down = Linear(config.latent_down) if config.latent else None
        self.latent_up = Linear(config.latent_up) if config.latent else None
        self.own(config.params())
        self.enter, self.leave, self.exchange = Enter(), Leave(), Exchange()  # the first two: without latent

    def forward(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "tokens embed"], RouterStats | None]:
        """The mixer's output, before the residual sum, and the router's statistics."""
        weights, experts, stats, bound = self.router.choose(x, ctx, key)
        send = self.exchange.announce(experts, self.config.experts, bound)
        z = self.latent_down(x, ctx) if self.latent_down else self.enter(x, ctx.segments.tokens)
        arrive = send(z, weights.to(z.dtype))
        inner = self._shared_up(x, ctx)
        rows, own, counts, home = arrive()
        arrive_home = home(expert_mlp(rows, self.experts.up_proj, self.experts.down_proj, counts, own))
        shared = self._shared_down(inner, ctx)
        y = arrive_home()
        y = self.latent_up(y, ctx) if self.latent_up else self.leave(y, ctx.segments.tokens)
        return y if shared is None else y + shared, stats

    def _shared_up(self, x: Tensor, ctx: Context) -> Tensor | None:
        """What of the shared expert runs while tokens travel to the routed ones."""
        if self.shared is None or self.exchange.alone:
            return x
        return self.shared.up(x, ctx)

    def _shared_down(self, inner: Tensor | None, ctx: Context) -> Tensor | None:
        """What of it runs while they travel back; all of it, in one operation, where nothing travels."""
        if self.shared is None or inner is None:
            return None
        return (self.shared.apply_to if self.exchange.alone else self.shared.down)(inner, ctx)
