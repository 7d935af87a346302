"""Mixture of experts with sigmoid routing, shared expert and optional latent width.

Router: DeepSeek-V3 (arXiv 2412.19437, 2.1.2). Latent form: Nemotron 3 (arXiv 2512.20856).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.nn.context import Context, RouterStats
from weft.nn.linear import Linear
from weft.nn.mlp import MLP
from weft.nn.module import Layer, Part
from weft.nn.slots import Enter, Exchange, Leave, Total
from weft.ops.experts import expert_mlp
from weft.ops.router import choice_frequency, count_choices, document_balance, route, z_loss
from weft.spec.layers import MoEConfig, RouterConfig


class Router(Linear):
    """Scores from the full width; choices by score plus bias; weights from the scores.

    Everything is computed in the dtype of the bias, which no policy reduces: fp32, or fp64 under fp64.
    """

    bias: Tensor

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self.config = config
        self.total = Total("tokens")

    def choose(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> tuple[Float[Tensor, "rows top_k"], Int[Tensor, "rows top_k"], RouterStats | None]:
        """Routing weights, chosen experts, statistics (none while generating)."""
        c = self.config
        dtype = self.bias.dtype
        logits = self.product(x.to(dtype), self.weight.to(dtype), ctx.segments.tokens)
        weights, experts, scores = route(
            logits,
            self.bias,
            c.top_k,
            groups=c.expert_groups,
            top_groups=c.top_groups,
            normalize=c.normalize,
            scale=c.scale,
            choices=ctx.replay.choices.get(key),
        )
        ctx.replay.choices.setdefault(key, experts)
        return weights, experts, None if ctx.cache else self.stats(logits, scores, experts, ctx)

    def stats(
        self,
        logits: Float[Tensor, "rows experts"],
        scores: Float[Tensor, "rows experts"],
        experts: Int[Tensor, "rows top_k"],
        ctx: Context,
    ) -> RouterStats:
        """Losses (only where their coefficients ask for them), entropy and load, of the tokens here."""
        c = self.config
        zero = logits.new_zeros(())
        if not torch.is_grad_enabled():
            return RouterStats(zero, zero, zero, torch.bincount(experts.flatten(), minlength=c.experts))
        z = c.z_coef * z_loss(logits) if c.z_coef else zero
        with torch.no_grad():
            share = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
            entropy = -torch.xlogy(share, share).sum()
        balance = self._balance(scores, experts, ctx) if c.aux_coef else zero
        return RouterStats(balance, z, entropy, torch.bincount(experts.flatten(), minlength=c.experts))

    def _balance(
        self, scores: Float[Tensor, "rows experts"], experts: Int[Tensor, "rows top_k"], ctx: Context
    ) -> Float[Tensor, ""]:
        """The balance loss of the tokens here, by how often whole documents chose each expert."""
        segments = ctx.segments
        ids = segments.ids(scores.device)[ctx.rows]
        chosen = self.total(count_choices(experts, ids, len(segments.lengths), self.config.experts))
        lengths = torch.tensor(segments.lengths, dtype=scores.dtype).to(scores.device)
        frequency = choice_frequency(chosen, lengths, self.config.top_k)
        return document_balance(scores, ids, self.config.aux_coef * frequency)


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
        tokens = ctx.segments.tokens
        weights, experts, stats = self.router.choose(x, ctx, key)
        z = self.latent_down(x, ctx) if self.latent_down else self.enter(x, tokens)
        ticket = self.exchange.dispatch(z, weights.to(z.dtype), experts, self.config.experts)
        rows = expert_mlp(
            ticket.rows, self.experts.up_proj, self.experts.down_proj, ticket.counts, ticket.weights
        )
        y = self.exchange.combine(rows, ticket)
        y = self.latent_up(y, ctx) if self.latent_up else self.leave(y, tokens)
        if self.shared:
            y = y + self.shared.apply_to(x, ctx)
        return y, stats
