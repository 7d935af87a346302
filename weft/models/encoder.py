"""Encoders of items: embedding, residual layers, perhaps a norm, then the projector to the decoder."""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.config.base import Config
from weft.models.hybrid import Localize
from weft.nn.context import Context
from weft.nn.encoder import EncoderBlock, Projector, pieces_of
from weft.nn.linear import LayerNorm
from weft.nn.module import Layer
from weft.ops.segments import Segments
from weft.plan.items import Pieces
from weft.spec.encoder import EncoderConfig

C = TypeVar("C", bound=Config)
E = TypeVar("E", bound=EncoderConfig)


def whole(config: C) -> C:
    """A layer as one rank computes it that has all of it."""
    return config


class Encoder(Layer, Generic[E]):
    """Items to residual rows of the decoder. Subclasses make the layers.

    Args:
        config: the whole encoder.
        local: each layer's config as one rank computes it; the same by default.
        has: whether a unit is here; all are by default.

    Attributes:
        rows: of so many rows, those that this rank has between its sharded layers (see ``Context.rows``).
    """

    def __init__(
        self, config: E, local: Localize = whole, has: Callable[[str], bool] = lambda unit: True
    ) -> None:
        super().__init__()
        self.config = config
        self.rows: Callable[[int], slice] = lambda rows: slice(None)
        if has("embed"):
            self.embed = self.make_embed(local)
        here = (i for i in range(len(config.blocks)) if has(f"layers.{i}"))
        self.layers = nn.ModuleDict({str(i): self.make_block(i, local) for i in here})
        if config.norm and has("norm"):
            self.norm = LayerNorm(local(config.norm))
        if has("projector"):
            self.projector = Projector(config.projector)

    def make_embed(self, local: Localize) -> Layer:
        """The unit ``embed``, called with what ``first`` is, and pieces and sizes of sequences."""
        raise NotImplementedError

    def make_block(self, number: int, local: Localize) -> EncoderBlock:
        """A layer."""
        raise NotImplementedError

    def units(self) -> dict[str, nn.Module]:
        """Modules whose parameters rest and move together, by name, in the order of use."""
        layers = {f"layers.{i}": layer for i, layer in self.layers.items()}
        children = dict(self.named_children())
        first, last = (
            {name: children[name] for name in names if name in children}
            for names in (("embed",), ("norm", "projector"))
        )
        return first | layers | last

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def context(self, pieces: Pieces) -> Context:
        """One pass over these pieces."""
        return Context(Segments(pieces.lengths), pieces=pieces, rows=self.rows(pieces.rows))

    def forward(self, data: Sequence[Tensor], ctx: Context) -> Float[Tensor, "outputs width"]:
        """Residual rows of the decoder; ``data`` as in ``first``."""
        rows = self.through(self.first(data, ctx), range(len(self.config.blocks)), ctx)
        return self.projector(self.last(rows, ctx))

    def first(self, data: Sequence[Float[Tensor, "_ _"]], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The rows of this rank before the first layer.

        Args:
            data: what each piece of these rows (``ctx.pieces.part``) is made of (``config.reads``): patches
                in block order, each as ``[frames * channels * patch * patch]`` normalized numbers, or mel
                frames; none where a piece has only prefix rows.
            ctx: the pass.
        """
        pieces = pieces_of(ctx)
        return self.embed(data, pieces.part(range(pieces.rows)[ctx.rows]), pieces.sizes)

    def through(
        self, x: Float[Tensor, "rows embed"], layers: Iterable[int], ctx: Context
    ) -> Float[Tensor, "rows embed"]:
        """The residual stream after some of the layers."""
        for i in layers:
            x = self.layers[str(i)](x, ctx)
        return x

    def last(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "outputs feature"]:
        """The residual stream after the last layer -> what the projector reads."""
        return self.norm(x) if self.config.norm else x

    def set_recompute(self, on: bool) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, EncoderBlock):
                module.recompute = on
