"""What ``pipeline_vs_torch.py`` runs: stages of layers of a model, of sleep, and of next to nothing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from weft.build.model import assemble
from weft.models.hybrid import HybridLM
from weft.nn.block import Block
from weft.nn.context import Context
from weft.ops.late import gradient, queued
from weft.ops.linear import linear
from weft.ops.segments import Segments
from weft.plan.pipelines import SPLIT, compute
from weft.plan.schedule import Graph, Lists
from weft.spec.hybrid import HybridConfig

RANKS, MICROBATCHES = 4, 8
SINGLE = ("gpipe", "1f1b")  # one stage per rank; the others have two
DEVICE = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "chunk_size": 64,
    "intermediate_size": 1024,
}
PATTERNS = {"hybrid": "M-*-" * 4, "mlp": "-" * 16}
TOKENS = 256  # of a microbatch
PACE = 0.004  # seconds of each F, B and W of a rank that has one stage


class Stage(nn.Module):
    """What both sides run."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Of the last stage: of its output and what it should be."""
        raise NotImplementedError


class Layers(Stage):
    """Some layers of a model, the token table before the first and the head after the last.

    ``plain``: MLP layers as a script of torch's own operations on the same parameters.
    """

    def __init__(self, model: HybridLM, stage: int, stages: int, tokens: int, plain: bool) -> None:
        super().__init__()
        count = len(model.layers) // stages
        own = [model.layers[str(i)] for i in range(stage * count, (stage + 1) * count)]
        self.layers, self.plain = nn.ModuleList(own), plain
        self.embed = model.embed if stage == 0 else None
        last = stage == stages - 1
        self.norm, self.head = (model.norm, model.head) if last else (None, None)
        self.segments = Segments((tokens,))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or the residual stream -> the residual stream, normalized after the last layer."""
        ctx = Context(self.segments)
        x = x if self.embed is None else self.embed(x)
        for i, layer in enumerate(self.layers):
            x = _plain(layer, x) if self.plain else layer(x, ctx, f"layers.{i}")
        return x if self.norm is None else self.norm(x)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy; means of microbatches add up."""
        assert self.head is not None  # noqa: S101 - only the last stage is asked
        return self.head([output], target[None], [1.0 / len(target)], len(target))[0]


def _plain(block: Block, x: Tensor) -> Tensor:
    weights = block.mixer.up_proj.weight, block.mixer.down_proj.weight
    normal = F.rms_norm(x, (x.shape[-1],), block.norm.weight, block.norm.config.eps)
    return x + F.linear(F.linear(normal, weights[0]).relu().square(), weights[1])


class _Nap(torch.autograd.Function):
    """The identity; F and B sleep, and so does W, unless somebody else does that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pace: float, apart: bool) -> Tensor:
        ctx.weight, ctx.pace, ctx.apart, ctx.shape = queued(weight), pace, apart, weight.shape
        time.sleep(pace)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.pace)
        if ctx.apart:
            return grad, grad.new_zeros(ctx.shape), None, None
        return grad, gradient(ctx.weight, _asleep, grad, ctx.pace, ctx.shape), None, None


def _asleep(grad: Tensor, pace: float, shape: torch.Size) -> Tensor:
    time.sleep(pace)
    return grad.new_zeros(shape)


class Paced(Stage):
    """A stage that sleeps. ``apart``: W is a call of ``weights``, not part of the backward pass."""

    def __init__(self, pace: float, apart: bool) -> None:
        super().__init__()
        self.weight, self.pace, self.apart = nn.Parameter(torch.zeros(1)), pace, apart

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return _Nap.apply(x, self.weight, self.pace, self.apart)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Anything."""
        return output.mean() + 0 * target.sum()

    def weights(self) -> Callable[[], None]:
        """What torch calls for W."""
        return lambda: time.sleep(self.pace)


class Tiny(Stage):
    """One small product. ``plain``: torch's own operation."""

    def __init__(self, stage: int, plain: bool) -> None:
        super().__init__()
        values = torch.randn(16, 16, generator=torch.Generator().manual_seed(stage)) / 4
        self.weight, self.product = nn.Parameter(values), F.linear if plain else linear

    def forward(self, x: Tensor) -> Tensor:
        """[8, 16] -> [8, 16]."""
        return self.product(x, self.weight)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Squares."""
        return (output - target).square().sum()


@dataclass(frozen=True)
class Job:
    """What both sides do.

    Attributes:
        kind: of pipeline.
        work: of stages.
        graph: where stages are.
        feed: what the first stage reads, of all microbatches.
        targets: what the last stage's loss reads.
        width: of what travels.
    """

    kind: str
    work: str
    graph: Graph
    feed: Tensor
    targets: Tensor
    width: int

    @property
    def own(self) -> tuple[str, ...]:
        """Stages of this rank."""
        return self.graph.at(dist.get_rank())

    @property
    def order(self) -> Lists:
        """Of passes, as ours."""
        return compute(self.kind, RANKS, len(self.graph.home) // RANKS, MICROBATCHES)[1]

    @property
    def rows(self) -> int:
        """Of a microbatch."""
        return len(self.feed) // MICROBATCHES

    def modules(self, ours: bool) -> dict[str, Stage]:
        """Stages of this rank as a side has them, always with the same values."""
        split, stages = self.kind in SPLIT, len(self.graph.home)
        if self.work == "paced":
            pace = PACE * RANKS / stages
            return {name: Paced(pace, apart=split and not ours) for name in self.own}
        if self.work == "tiny":
            return {name: Tiny(int(name), plain=not ours) for name in self.own}
        model = assemble(HybridConfig(pattern=PATTERNS[self.work], **SIZES), "fp32", DEVICE, seed=0)
        plain = self.work == "mlp" and not ours
        return {name: Layers(model, int(name), stages, TOKENS, plain) for name in self.own}


def job(kind: str, work: str) -> Job:
    """Data of a kind of work."""
    stages = 1 if kind in SINGLE else 2
    graph, _ = compute(kind, RANKS, stages, MICROBATCHES)
    made = torch.Generator().manual_seed(0)
    if work in PATTERNS:
        tokens = torch.randint(SIZES["vocab_size"], (2, MICROBATCHES * TOKENS), generator=made)
        return Job(kind, work, graph, tokens[0], tokens[1], SIZES["hidden_size"])
    rows, width = {"paced": (64, 256), "tiny": (8, 16)}[work]
    values = torch.randn(2, MICROBATCHES * rows, width, generator=made)
    return Job(kind, work, graph, values[0], values[1], width)
