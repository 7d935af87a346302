"""The slots: places where a layer's mathematics may need a peer, with one-device defaults.

The whole vocabulary: enter and leave (joined with their product in a projection), total, lookup, attend,
scan (with the convolution before it), dispatch/combine, loss; in encoders halo and regroup. A parallel layout
replaces a slot; the layer around it does not change.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from weft.nn.state import KVState, MambaState
from weft.ops.attention import attend, attend_cached
from weft.ops.conv import causal_conv, conv_step
from weft.ops.cross_entropy import linear_cross_entropy
from weft.ops.dispatch import Sorted, collect, sort, spread
from weft.ops.linear import linear
from weft.ops.scan import ssd, ssd_step
from weft.ops.segments import Segments
from weft.plan.items import Pieces


class Product(nn.Module):
    """``x W^T`` with what a layout puts before and after it: ``enter`` and ``leave`` of a projection.

    They are one slot because their collectives run under the products of the backward pass.
    """

    alone = True

    def forward(
        self, x: Float[Tensor, "tokens cols"], weight: Float[Tensor, "rows cols"], tokens: int
    ) -> Float[Tensor, "tokens rows"]:
        """``tokens``: length of the whole run of tokens, of which ``x`` may hold a part."""
        return linear(x, weight)


class Enter(nn.Module):
    """Residual activations of this rank -> whole features of some of its tokens."""

    def forward(self, x: Float[Tensor, "tokens embed"], tokens: int) -> Float[Tensor, "tokens embed"]:
        """All features are here already."""
        return x


class Leave(nn.Module):
    """The way back from ``Enter``."""

    def forward(self, x: Float[Tensor, "tokens embed"], tokens: int) -> Float[Tensor, "tokens embed"]:
        """The residual has whole features."""
        return x


class Total(nn.Module):
    """Sum of a small statistic over the ranks that share what it was taken over.

    Args:
        over: ``features`` of a group of the owner's weight, ``tokens`` of the whole run, or the ``batch``:
            all tokens that ranks compute with at the same time.
        group: features of one group, whoever holds them.
    """

    alone = True

    def __init__(self, over: Literal["features", "tokens", "batch"], group: int = 0) -> None:
        super().__init__()
        self.over: Literal["features", "tokens", "batch"] = over
        self.group = group

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The statistic is complete already."""
        return x


class Halo(nn.Module):
    """The rows here with those around them that other ranks have of the same sequences.

    Args:
        rows: how far it reaches on both sides; to the ends of the sequence if None.
    """

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Shaped[Tensor, "rows *width"], pieces: Pieces) -> Shaped[Tensor, "around *width"]:
        """Rows of ``pieces.here`` -> of ``pieces.reach(self.rows)``; whole sequences are here already."""
        return x


class Regroup(nn.Module):
    """Rows of sequences -> some of them in blocks, each block whole on one rank.

    Args:
        skip: rows at the beginning of each sequence that are left out.
        block: rows of a block; it divides the rows of every sequence without the first ``skip``.
    """

    def __init__(self, skip: int, block: int) -> None:
        super().__init__()
        self.skip, self.block = skip, block

    def forward(self, x: Shaped[Tensor, "rows width"], pieces: Pieces) -> Shaped[Tensor, "blocks wide"]:
        """Rows of ``pieces.here`` -> their blocks, rows of a block side by side (wide = block * width)."""
        own = (
            x[max(self.skip - p.start, 0) :]
            for p, x in zip(pieces.here, x.split(pieces.lengths), strict=True)
        )
        return torch.cat([x[:0], *own]).reshape(-1, self.block * x.shape[-1])


class Lookup(nn.Module):
    """Rows of a (sharded) token table, as residual activations."""

    def forward(
        self, ids: Int[Tensor, " tokens"], weight: Float[Tensor, "vocab embed"]
    ) -> Float[Tensor, "tokens embed"]:
        """The table is whole; a negative id (no token there) gives zeros."""
        return F.embedding(ids.clamp_min(0), weight).masked_fill((ids < 0).unsqueeze(-1), 0.0)


class Attend(nn.Module):
    """Causal attention inside segments, over a cache where there is one."""

    def forward(
        self,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        segments: Segments,
        state: KVState | None = None,
        past: list[int] | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Keys and values are here already. ``past``: tokens of each sequence already in ``state``."""
        scale = q.shape[-1] ** -0.5
        if state is None or past is None:
            return attend(q, k, v, segments, scale)
        return attend_cached(q, k, v, state.keys, state.values, segments, past, scale)


class Conv(NamedTuple):
    """A depthwise causal convolution."""

    weight: Float[Tensor, "channels taps"]
    bias: Float[Tensor, " channels"]


class Scan(nn.Module):
    """The Mamba-2 scan inside segments, from a state where there is one."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(
        self,
        x: Float[Tensor, "tokens heads head_dim"],
        dt: Float[Tensor, "tokens heads"],
        A: Float[Tensor, " heads"],
        B: Float[Tensor, "tokens groups state"],
        C: Float[Tensor, "tokens groups state"],
        D: Float[Tensor, " heads"],
        segments: Segments,
        state: MambaState | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Segments begin here and end here."""
        if state is None:
            return cast(Tensor, ssd(x, dt, A, B, C, D, segments, self.chunk))
        if segments.uniform == 1:
            return ssd_step(state.ssm, x, dt, A, B, C, D)
        y, final = ssd(x, dt, A, B, C, D, segments, self.chunk, initial=state.ssm, return_final=True)
        state.ssm.copy_(final)
        return y

    def convolved(
        self,
        xBC: Float[Tensor, "tokens channels"],
        conv: Conv,
        dt: Float[Tensor, "tokens heads"],
        A: Float[Tensor, " heads"],
        D: Float[Tensor, " heads"],
        sizes: tuple[int, int],
        segments: Segments,
        state: MambaState | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """``silu(conv(xBC))``, split into x, B and C, then the scan. ``sizes``: groups, and state of each."""
        inputs = split_channels(convolve(xBC, conv, segments, state), len(A), sizes)
        return self.forward(inputs[0], dt, A, *inputs[1:], D, segments, state)


def convolve(
    x: Float[Tensor, "tokens channels"], conv: Conv, segments: Segments, state: MambaState | None
) -> Float[Tensor, "tokens channels"]:
    """``silu(conv(x))`` of segments that begin here, or go on from a state."""
    if state is None:
        return cast(Tensor, causal_conv(x, *conv, segments))
    if segments.uniform == 1:
        return conv_step(state.conv, x, *conv)
    y, final = causal_conv(x, *conv, segments, initial=state.conv, return_final=True)
    state.conv.copy_(final)
    return y


def split_channels(
    xBC: Float[Tensor, "tokens channels"], heads: int, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``[x | B | C]`` by head and by group."""
    inner = xBC.shape[1] - 2 * sizes[0] * sizes[1]
    x, B, C = xBC.split([inner, sizes[0] * sizes[1], sizes[0] * sizes[1]], dim=-1)
    return x.unflatten(-1, (heads, -1)), B.unflatten(-1, sizes), C.unflatten(-1, sizes)


class ConvScan(nn.Module):
    """A convolution and the scan after it: one slot, so that a layout exchanges once for both."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.scan = Scan(chunk)

    def forward(
        self,
        xBC: Float[Tensor, "tokens channels"],
        conv: Conv,
        dt: Float[Tensor, "tokens heads"],
        A: Float[Tensor, " heads"],
        D: Float[Tensor, " heads"],
        sizes: tuple[int, int],
        segments: Segments,
        state: MambaState | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """See ``Scan.convolved``."""
        return self.scan.convolved(xBC, conv, dt, A, D, sizes, segments, state)


class Arrived(NamedTuple):
    """Rows for the experts here, those of expert 0 first.

    Attributes:
        rows: what the experts read.
        weights: routing weight of each row.
        counts: rows of each expert.
        home: sends what became of the rows back; call what it gives to have their sum for each token.
    """

    rows: Float[Tensor, "rows width"]
    weights: Float[Tensor, " rows"]
    counts: list[int]
    home: Callable[[Tensor], Callable[[], Tensor]]


Send = Callable[[Tensor, Tensor], Callable[[], Arrived]]
"""Tokens and their weights, on their way to experts; call what it gives when the rows are needed."""


def arrange(
    x: Float[Tensor, "tokens width"], weights: Float[Tensor, "tokens slots"], order: Sorted
) -> Arrived:
    """Rows of tokens that are here, in the order of the experts here."""
    rows, back, counts, full = order
    own = spread(weights.reshape(-1, 1), rows, back.view(-1, 1), full).squeeze(1)
    return Arrived(spread(x, rows, back, full), own, counts, lambda y: lambda: collect(y, rows, back, full))


class Exchange(nn.Module):
    """Tokens to experts (dispatch) and back (combine), summed in slot order.

    What is under way is called when it is needed, so that a layout can exchange under other work: first
    ``announce``, then the tokens, then the rows of the experts, at last their results.
    """

    alone = True

    def announce(
        self, experts: Int[Tensor, "tokens slots"], num_experts: int, bound: int | None = None
    ) -> Send:
        """Say which experts each token goes to.

        Args:
            experts: -1 where a slot goes nowhere.
            num_experts: routed experts.
            bound: rows of every expert, some of them padding: static shapes; None is as many as come.
        """
        order = sort(experts, num_experts, bound)

        def send(x: Tensor, weights: Tensor) -> Callable[[], Arrived]:
            arrived = arrange(x, weights, order)
            return lambda: arrived

        return send


class Loss(nn.Module):
    """Cross-entropy of the output head, without ever holding all logits."""

    def forward(
        self,
        hidden: Float[Tensor, "rows embed"],
        weight: Float[Tensor, "vocab width"],
        targets: Int[Tensor, " tokens"],
        scale: float,
        chunk: int,
    ) -> Float[Tensor, ""]:
        """``scale`` times the summed loss of targets >= 0; the vocabulary is whole.

        Under a layout ``targets`` are those of the whole run of tokens, ``hidden`` this rank's part of it and
        the result its part of the sum.
        """
        return linear_cross_entropy(hidden, weight, targets, chunk=chunk, scale=scale)

    def best(
        self,
        hidden: Float[Tensor, "rows embed"],
        weight: Float[Tensor, "vocab width"],
        targets: Int[Tensor, " tokens"],
        chunk: int,
    ) -> Int[Tensor, " rows"]:
        """The most likely token after each row here; the first of equals. ``targets`` as in ``forward``."""
        parts = [linear(h, weight).argmax(-1) for h in hidden.split(chunk)]
        return torch.cat([targets.new_zeros(0), *parts])
