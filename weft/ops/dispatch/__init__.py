"""Tokens to (token, slot) rows in expert order, and back: one map, each way the other's transpose.

Where nothing is missing the map is a permutation. Else -1 stands for a pair that goes nowhere (``back``) and
for a row of padding (``order``). Both ways gather and sum slots in order, the gradients too: there is no
scatter-add, so results are the same bits on every run and device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def ranked(
    experts: Int[Tensor, "tokens slots"], num_experts: int
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " experts_and_end"]]:
    """Pairs in the order of experts, stably, those of no expert (-1) last; nothing is asked of the device.

    Returns:
        The expert of each (``num_experts`` where none), the pair, and where each expert's pairs begin and the
        last one's end.
    """
    flat = experts.flatten().long()
    keys, pairs = flat.masked_fill(flat < 0, num_experts).sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(num_experts + 1, device=keys.device))
    return keys, pairs, starts


def inverse(order: Int[Tensor, " rows"], shape: Sequence[int]) -> Int[Tensor, "tokens slots"]:
    """The row of each pair, -1 where it has none; every row is a pair."""
    back = order.new_full((shape[0] * shape[1],), -1)
    return back.scatter_(0, order, torch.arange(len(order), device=order.device)).view(*shape)


class Sorted(NamedTuple):
    """(token, slot) pairs as rows in the order of experts.

    Attributes:
        order: the pair (token * slots + slot) of each row; -1 is padding.
        back: the row of each pair; -1 goes nowhere.
        counts: rows of each expert.
        full: whether neither has a -1.
    """

    order: Int[Tensor, " rows"]
    back: Int[Tensor, "tokens slots"]
    counts: list[int]
    full: bool


def sort(experts: Int[Tensor, "tokens slots"], num_experts: int, bound: int | None = None) -> Sorted:
    """Rows in the order of experts, pairs of one expert in their own order.

    Args:
        experts: of each pair; -1 goes nowhere.
        num_experts: how many there are.
        bound: rows of every expert: pair j of expert e is row ``e * bound + j``, a pair beyond them goes
            nowhere, and nothing is asked of the device; None is as many rows as there are pairs.
    """
    keys, pairs, starts = ranked(experts, num_experts)
    if bound is None:
        counts = starts.diff().tolist()
        order = pairs[: sum(counts)]
        return Sorted(order, inverse(order, experts.shape), counts, len(order) == len(pairs))
    rows, device = num_experts * bound, keys.device
    place = torch.arange(len(keys), device=device) - starts[keys]
    row = torch.where((keys < num_experts) & (place < bound), keys * bound + place, rows)
    order = pairs.new_full((rows + 1,), -1).scatter_(0, row, pairs)[:rows].contiguous()
    back = torch.empty_like(pairs).scatter_(0, pairs, row.masked_fill(row == rows, -1))
    return Sorted(order, back.view(experts.shape), [bound] * num_experts, False)


def _to_rows(x: Tensor, order: Tensor, back: Tensor, full: bool) -> Tensor:
    if full:
        return x.index_select(0, order // back.shape[1])
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])  # a row of zeros is less to move than a mask of rows
    pair = order.masked_fill(order < 0, len(x) * back.shape[1])
    return padded.index_select(0, pair // back.shape[1])


def _to_tokens(rows: Tensor, back: Tensor, full: bool) -> Tensor:
    if full:
        return F.embedding_bag(back, rows, mode="sum")  # adds in slot order, without a copy of all rows
    if not len(rows):
        return rows.new_zeros(len(back), rows.shape[1])
    # What is missing adds zero times a row of its own token, so that nothing leaks between tokens.
    here = (back >= 0).to(rows.dtype)
    own = torch.where(back < 0, back.amax(1, keepdim=True), back)
    y = F.embedding_bag(own.clamp_min(0), rows, mode="sum", per_sample_weights=here)
    return y.masked_fill_((own[:, :1] < 0), 0.0)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, full: bool) -> Tensor:
        ctx.save_for_backward(order, back)
        ctx.full = full
        return _to_rows(x, order, back, full)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Collect.apply(grads[0], *ctx.saved_tensors, ctx.full), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor, full: bool) -> Tensor:
        ctx.save_for_backward(order, back)
        ctx.full = full
        return _to_tokens(rows, back, full)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.full), None, None, None


def spread(
    x: Float[Tensor, "tokens width"],
    order: Int[Tensor, " rows"],
    back: Int[Tensor, "tokens slots"],
    full: bool = True,
) -> Float[Tensor, "rows width"]:
    """Row ``order[r] // slots`` of ``x`` for each r, zeros where that is -1.

    Args:
        x: tokens.
        order: the pair (token * slots + slot) of each row.
        back: the row of each pair.
        full: neither has a -1, so that nothing need be looked at.
    """
    return (_Spread.apply if torch.is_grad_enabled() else _to_rows)(x, order, back, full)


def collect(
    rows: Float[Tensor, "rows width"],
    order: Int[Tensor, " rows"],
    back: Int[Tensor, "tokens slots"],
    full: bool = True,
) -> Float[Tensor, "tokens width"]:
    """Sum over slots of ``rows[back[t, s]]``, in slot order: the transpose of ``spread``."""
    if torch.is_grad_enabled():
        return _Collect.apply(rows, order, back, full)
    return _to_tokens(rows, back, full)
