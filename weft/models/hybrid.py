"""The hybrid language model: token table, residual layers, final norm, head, MTP depths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.nn.block import Block
from weft.nn.context import Context, RouterStats
from weft.nn.linear import Embedding, Head, Linear, RMSNorm
from weft.nn.module import Layer
from weft.nn.state import Cache
from weft.ops.segments import Segments
from weft.spec.hybrid import HybridConfig, MTPDepthConfig


@dataclass(frozen=True)
class Losses:
    """Sums of one microbatch, each already times its scale.

    Attributes:
        lm: next-token cross-entropy.
        mtp: cross-entropy of each MTP depth.
        stats: router statistics by layer (a repeated MTP depth reports once per repetition).
    """

    lm: Float[Tensor, ""]
    mtp: tuple[Float[Tensor, ""], ...]
    stats: dict[str, RouterStats]


class MTPDepth(Layer):
    """One physical multi-token-prediction depth (DeepSeek-V3, arXiv 2412.19437, 2.2)."""

    def __init__(self, config: MTPDepthConfig) -> None:
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(config.norm), RMSNorm(config.norm)
        self.eh_proj = Linear(config.eh_proj)
        self.layers = nn.ModuleList(Block(block) for block in config.blocks)
        self.norm = RMSNorm(config.norm)

    def forward(
        self,
        embedded: Float[Tensor, "tokens embed"],
        hidden: Float[Tensor, "tokens embed"],
        ctx: Context,
        key: str,
    ) -> Float[Tensor, "tokens embed"]:
        """Hidden state that predicts one token further.

        Args:
            embedded: embedding of the token this depth looks ahead to.
            hidden: the state of the depth before (after its final norm).
            ctx: the forward pass.
            key: name of this repetition, for router choices and statistics.
        """
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx, f"{key}.layers.{i}")
        return self.norm(x)


class HybridLM(Layer):
    """Mamba-2, attention, MLP and MoE layers in the order of the config's pattern."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.embedding)
        self.layers = nn.ModuleList(Block(block) for block in config.blocks)
        self.norm = RMSNorm(config.norm)
        self.head = Head(config.embedding)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleList(MTPDepth(depth) for depth in config.mtp)

    def hidden(self, tokens: Int[Tensor, " tokens"], ctx: Context) -> Float[Tensor, "tokens embed"]:
        """States after the final norm, which the head (and MTP) read."""
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx, f"layers.{i}")
        return self.norm(x)

    def ahead(
        self,
        hidden: Float[Tensor, "tokens embed"],
        future: Int[Tensor, "depths tokens"],
        ctx: Context,
    ) -> list[Float[Tensor, "tokens embed"]]:
        """States of each MTP depth; ``future[k - 1]`` is the token k places ahead, -1 where none is."""
        states = []
        for depth in range(self.config.depths):
            block = self.mtp[depth % len(self.mtp)]
            hidden = block(self.embed(future[depth]), hidden, ctx, f"mtp.{depth}")
            states.append(hidden)
        return states

    def losses(
        self,
        tokens: Int[Tensor, " tokens"],
        future: Int[Tensor, "ahead tokens"],
        mask: Tensor,
        segments: Segments,
        scales: Sequence[float],
        chunk: int = 1024,
    ) -> Losses:
        """All training losses of one microbatch.

        Args:
            tokens: token ids.
            future: ``future[k - 1]`` is the token k places ahead in the same document, else -1;
                one row more than there are MTP depths.
            mask: which targets count, same shape as ``future``.
            segments: documents.
            scales: factor of each summed loss (one over the global number of its targets).
            chunk: tokens whose logits exist at a time.
        """
        ctx = Context(segments)
        states = [self.hidden(tokens, ctx)]
        states += self.ahead(states[0], future, ctx)
        targets = future.masked_fill(~mask, -1)
        weight = self.head.wide_weight()  # once for all depths: their gradients add up in the wide dtype
        sums = [self.head.loss(state, weight, targets[k], scales[k], chunk) for k, state in enumerate(states)]
        return Losses(sums[0], tuple(sums[1:]), ctx.stats)

    def logits(
        self, tokens: Int[Tensor, " tokens"], segments: Segments, cache: Cache | None = None
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of every token; with a cache, the tokens continue its sequences and are added to it."""
        if cache is None:
            return self.head(self.hidden(tokens, Context(segments)))
        return self.head(self.extend(tokens, segments, cache))

    def extend(
        self, tokens: Int[Tensor, " tokens"], segments: Segments, cache: Cache
    ) -> Float[Tensor, "tokens embed"]:
        """States after the final norm of tokens that continue the cache's sequences; adds them to it."""
        hidden = self.hidden(tokens, Context(segments, cache=cache))
        cache.lengths = [held + new for held, new in zip(cache.lengths, segments.lengths, strict=True)]
        return hidden

    def set_recompute(self, on: bool) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = on
