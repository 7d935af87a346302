"""What encoders have in common: a residual stack over the rows of a sequence, and a projector to the decoder.

Axes that a layout cuts are those of the decoder (``heads``, ``mlp``; ``embed`` is never cut in an encoder).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from weft.config.base import Config, setting
from weft.config.errors import Problem
from weft.spec.layers import LayerNormConfig, LinearConfig, NormConfig
from weft.spec.param import ParamSpec, Part, dim


@runtime_checkable
class Owner(Protocol):
    """Something that has parameters, named from itself."""

    def params(self) -> tuple[ParamSpec, ...]:
        """All of them, in module order."""
        ...


def under(**children: Owner) -> tuple[ParamSpec, ...]:
    """Parameters of named children, in order."""
    return tuple(spec.under(name) for name, child in children.items() for spec in child.params())


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Config):
    """Features of an encoder -> residual rows of the decoder: ``down(relu(up(norm(x)))^2)``.

    No layout cuts its dimensions: each rank applies it to its own rows.
    """

    feature: int = setting(doc="width it reads", ge=1)
    joint: int = setting(doc="inner width", ge=1)
    output: int = setting(doc="width it writes", ge=1)
    bias: bool = setting(False, "whether its products have biases")
    eps: float = setting(1e-5, "norm epsilon", gt=0)
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    @property
    def norm(self) -> NormConfig:
        """Over the features."""
        return NormConfig(dims=dim("feature", self.feature), eps=self.eps, group=self.feature)

    @property
    def up(self) -> LinearConfig:
        """Into the inner width."""
        return LinearConfig(
            rows=dim("joint", self.joint), cols=dim("feature", self.feature), std=self.std, bias=self.bias
        )

    @property
    def down(self) -> LinearConfig:
        """To the decoder's width."""
        return LinearConfig(
            rows=dim("output", self.output), cols=dim("joint", self.joint), std=self.std, bias=self.bias
        )

    def params(self) -> tuple[ParamSpec, ...]:
        """Norm and two products."""
        return under(norm=self.norm, up=self.up, down=self.down)


@dataclass(frozen=True, kw_only=True)
class PieceAttentionConfig(Config):
    """Attention of every row of a sequence to every other, with as many key heads as query heads."""

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    heads: int = setting(doc="heads", ge=1, dim="heads")
    head_dim: int = setting(doc="channels per head", ge=1)
    bias: bool = setting(True, "whether queries, keys and values have biases")
    out_bias: bool = setting(True, "whether the projection back has one")
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    @property
    def qkv_proj(self) -> LinearConfig:
        """Fused query, key and value projection, ``[q | k | v]``."""
        rows = tuple(Part("heads", self.heads, self.head_dim, label) for label in "qkv")
        return LinearConfig(rows=rows, cols=dim("embed", self.embed), std=self.std, bias=self.bias)

    @property
    def o_proj(self) -> LinearConfig:
        """Projection back to the residual."""
        cols = dim("heads", self.heads, self.head_dim)
        return LinearConfig(rows=dim("embed", self.embed), cols=cols, std=self.std, bias=self.out_bias)

    def params(self) -> tuple[ParamSpec, ...]:
        """Fused qkv and output projection."""
        return under(qkv_proj=self.qkv_proj, o_proj=self.o_proj)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """An encoder of items (images, clips), whose rows take the places of placeholder tokens in the decoder.

    A subclass says which ``kind`` it is, how items become rows, and what its layers are.
    """

    kind: str
    hidden_size: int = setting(doc="residual width", ge=1)
    num_hidden_layers: int = setting(doc="layers", ge=1)
    num_attention_heads: int = setting(doc="attention heads", ge=1)
    intermediate_size: int = setting(doc="inner width of the MLPs", ge=1)
    initializer_range: float = setting(0.02, "standard deviation of initial weights", ge=0)
    layer_norm_eps: float = setting(1e-5, "norm epsilon", gt=0)
    output_size: int = setting(doc="residual width of the decoder", ge=1)
    projector_size: int = setting(doc="inner width of the projector", ge=1)
    projector_bias: bool = setting(False, "whether the projector's products have biases")
    projector_eps: float = setting(1e-5, "epsilon of the projector's norm", gt=0)
    token: int = setting(doc="placeholder token in the decoder's vocabulary", ge=0)
    start_token: int = setting(-1, "token before an item's placeholders; -1 is none", ge=-1)
    end_token: int = setting(-1, "token after an item's placeholders; -1 is none", ge=-1)

    def check(self) -> Iterator[Problem]:
        """Heads divide the width; the tokens differ."""
        if self.hidden_size % self.num_attention_heads:
            message = f"{self.num_attention_heads} heads do not divide hidden_size = {self.hidden_size}"
            yield Problem("num_attention_heads", message)
        for name in ("start_token", "end_token"):
            if getattr(self, name) == self.token:
                yield Problem(name, f"{self.token} is the placeholder token too; choose another, or -1")

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embed(self) -> Owner:
        """What turns items into rows (the unit ``embed``)."""
        raise NotImplementedError

    @cached_property
    def blocks(self) -> tuple[Owner, ...]:
        """The layers, in order."""
        raise NotImplementedError

    @property
    def norm(self) -> LayerNormConfig | None:
        """What comes after the last layer (the unit ``norm``), if anything."""
        return None

    @property
    def feature_width(self) -> int:
        """Width of what the projector reads."""
        return self.hidden_size

    @property
    def projector(self) -> ProjectorConfig:
        """Features to residual rows of the decoder."""
        return ProjectorConfig(
            feature=self.feature_width,
            joint=self.projector_size,
            output=self.output_size,
            bias=self.projector_bias,
            eps=self.projector_eps,
            std=self.initializer_range,
        )

    @property
    def skip(self) -> int:
        """Rows at the beginning of every sequence that give the decoder nothing."""
        return 0

    @property
    def grain(self) -> int:
        """Rows that become one row of the decoder; a sequence is cut between such blocks only."""
        return 1

    @property
    def together(self) -> bool:
        """Whether all sequences of an item are encoded on one rank."""
        return False

    def rows(self, size: tuple[int, ...]) -> int:
        """Rows of a sequence of this size."""
        raise NotImplementedError

    def reads(self, start: int, stop: int, size: tuple[int, ...]) -> tuple[int, int]:
        """What rows ``start`` to ``stop`` of a sequence are made of: a range of its patches, or frames."""
        return max(0, start - self.skip), max(0, stop - self.skip)

    def outputs(self, size: tuple[int, ...]) -> int:
        """Rows of the decoder that a sequence of this size gives."""
        raise NotImplementedError

    def flops(self, rows: int) -> float:
        """Forward floating-point operations of a sequence in the layers: products, scores, their use."""
        scores = 4.0 * len(self.blocks) * self.hidden_size
        return 2.0 * self._products * rows + scores * rows**2

    @cached_property
    def _products(self) -> int:
        """Elements of the layers' matrices: a row is multiplied by each once."""
        return sum(spec.numel for block in self.blocks for spec in block.params() if len(spec.dims) == 2)

    def params(self) -> tuple[ParamSpec, ...]:
        """Every parameter, global names, in module order."""
        specs = under(embed=self.embed)
        specs += under(**{f"layers.{i}": block for i, block in enumerate(self.blocks)})
        if self.norm:
            specs += under(norm=self.norm)
        return specs + under(projector=self.projector)
