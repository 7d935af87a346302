"""The hybrid language model: token table, residual layers, final norm, head, MTP depths."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.config.base import Config
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
        choices: experts by layer, of the tokens ``model.rows`` that this rank routes.
    """

    lm: Float[Tensor, ""]
    mtp: tuple[Float[Tensor, ""], ...]
    stats: dict[str, RouterStats]
    choices: dict[str, Int[Tensor, "rows top_k"]]


C = TypeVar("C", bound=Config)


@runtime_checkable
class Localize(Protocol):
    """Config -> Config: a layer as one rank computes it (``weft.plan.shard.localize``)."""

    def __call__(self, config: C) -> C:  # noqa: D102
        ...


def _whole(config: C) -> C:
    return config


class MTPDepth(Layer):
    """One physical multi-token-prediction depth (DeepSeek-V3, arXiv 2412.19437, 2.2)."""

    def __init__(self, config: MTPDepthConfig, local: Localize) -> None:
        super().__init__()
        norm = local(config.norm)
        self.enorm, self.hnorm = RMSNorm(norm), RMSNorm(norm)
        self.eh_proj = Linear(local(config.eh_proj))
        self.layers = nn.ModuleList(Block(local(block)) for block in config.blocks)
        self.norm = RMSNorm(norm)

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
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1), ctx)
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx, f"{key}.layers.{i}")
        return self.norm(x)


class HybridLM(Layer):
    """Mamba-2, attention, MLP and MoE layers in the order of the config's pattern.

    Args:
        config: the whole model.
        local: each layer's config as one rank computes it; the same by default.
        has: whether a unit is here (a pipeline rank has some of them); all are by default.

    Attributes:
        rows: of so many tokens, those whose whole features this rank has (see ``Context.rows``).
        projectors: of encoders whose features are projected here, by their names.
    """

    def __init__(
        self, config: HybridConfig, local: Localize = _whole, has: Callable[[str], bool] = lambda unit: True
    ) -> None:
        super().__init__()
        self.config = config
        self.rows: Callable[[int], slice] = lambda tokens: slice(None)
        self.projectors = nn.ModuleDict()
        if has("embed"):
            self.embed = Embedding(config.embedding)
        blocks = {f"layers.{i}": block for i, block in enumerate(config.blocks)}
        here = {name: Block(local(block)) for name, block in blocks.items() if has(name)}
        self.layers = nn.ModuleDict({name.removeprefix("layers."): layer for name, layer in here.items()})
        if has("head"):
            self.norm = RMSNorm(local(config.norm))
            self.head = Head(config.embedding)
            if config.tie_word_embeddings:
                self.head.weight = self.embed.weight
        depths = config.mtp if has("mtp") else ()
        self.mtp = nn.ModuleList(MTPDepth(depth, local) for depth in depths)

    def units(self) -> dict[str, nn.Module]:
        """Modules whose parameters rest and move together, by name, in the order of use."""
        units: dict[str, nn.Module] = {}
        for name, module in self.named_children():
            if name == "layers":
                units |= {f"layers.{i}": layer for i, layer in module.named_children()}
            elif name == "projectors":
                units |= {f"projectors.{one}": layer for one, layer in module.named_children()}
            elif name != "mtp":
                units[name] = module
        for i, depth in enumerate(self.mtp):
            units[f"mtp.{i}"] = depth
            layers = depth.get_submodule("layers").children()
            units |= {f"mtp.{i}.layers.{j}": layer for j, layer in enumerate(layers)}
        return units

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def context(self, segments: Segments, **known: Any) -> Context:
        """One forward pass over these documents; ``known`` are further fields of the context."""
        return Context(segments, rows=self.rows(segments.tokens), **known)

    def hidden(self, tokens: Int[Tensor, " tokens"], ctx: Context) -> Float[Tensor, "rows width"]:
        """States after the final norm, which the head (and MTP) read; under a layout this rank's part."""
        return self.norm(self.through(self.embed(tokens), range(len(self.layers)), ctx))

    def through(
        self, x: Float[Tensor, "rows width"], layers: Iterable[int], ctx: Context
    ) -> Float[Tensor, "rows width"]:
        """The residual stream after some of the main layers."""
        for i in layers:
            x = self.layers[str(i)](x, ctx, f"layers.{i}")
        return x

    def ahead(
        self,
        hidden: Float[Tensor, "rows width"],
        future: Int[Tensor, "depths tokens"],
        ctx: Context,
    ) -> list[Float[Tensor, "rows width"]]:
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
        ctx: Context,
        scales: Sequence[float],
        chunk: int = 1024,
    ) -> Losses:
        """All training losses of one microbatch.

        Args:
            tokens: token ids.
            future: ``future[k - 1]`` is the token k places ahead in the same document, else -1;
                one row more than there are MTP depths.
            mask: which targets count, same shape as ``future``.
            ctx: the forward pass (``context``).
            scales: factor of each summed loss (one over the global number of its targets).
            chunk: tokens whose logits exist at a time.
        """
        hidden = self.through(self.embed(tokens), range(len(self.layers)), ctx)
        return self.end(hidden, future, mask, ctx, scales, chunk)

    def end(
        self,
        x: Float[Tensor, "rows width"],
        future: Int[Tensor, "ahead tokens"],
        mask: Tensor,
        ctx: Context,
        scales: Sequence[float],
        chunk: int = 1024,
    ) -> Losses:
        """``losses``, from the residual stream after the main layers on."""
        states = [self.norm(x)]
        states += self.ahead(states[0], future, ctx)
        sums = self.head(states, future.masked_fill(~mask, -1), scales, chunk)
        return Losses(sums[0], tuple(sums[1:]), ctx.stats, ctx.replay.choices)

    def logits(
        self, tokens: Int[Tensor, " tokens"], segments: Segments, cache: Cache | None = None
    ) -> Float[Tensor, "tokens vocab"]:
        """Logits of every token; with a cache, the tokens continue its sequences and are added to it."""
        if cache is None:
            return self.head.logits(self.hidden(tokens, Context(segments)))
        return self.head.logits(self.extend(tokens, segments, cache))

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
