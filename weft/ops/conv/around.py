"""The convolution over pieces as shifted multiply-adds, channels last, over blocks that stay in the cache."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.blocks import block_rows, blocks
from weft.plan.items import Piece, reach

BLOCK_NUMBERS = 2**18  # of a block of outputs: it, its inputs and taps fit a core's cache


class _Block(NamedTuple):
    """Some neighbouring outputs of a piece.

    Attributes:
        own: their rows.
        seen: rows of the inputs of the piece.
        shift: row among ``seen`` that the first tap multiplies for the first output; negative before the end.
    """

    own: slice
    seen: slice
    shift: int

    def taps(self, count: int) -> Iterator[tuple[int, slice, slice]]:
        """(tap, outputs that it reaches, rows of the whole input that it multiplies for them)."""
        rows, inputs = self.own.stop - self.own.start, self.seen.stop - self.seen.start
        for tap in range(count):
            first, last = max(0, -self.shift - tap), min(rows, inputs - self.shift - tap)
            if first < last:
                start = self.seen.start + self.shift + tap
                yield tap, slice(first, last), slice(start + first, start + last)


def _blocks(pieces: Sequence[Piece], x: Tensor, taps: int) -> Iterator[_Block]:
    half, own, seen = taps // 2, 0, 0
    for piece in pieces:
        around = reach(piece, half)
        for part in blocks(piece.rows, block_rows(x.device, x.shape[1], BLOCK_NUMBERS)):
            shift = piece.start + part.start - half - around.start
            yield _Block(slice(own + part.start, own + part.stop), slice(seen, seen + around.rows), shift)
        own, seen = own + piece.rows, seen + around.rows


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
        out = x.new_empty(sum(piece.rows for piece in pieces), x.shape[1])
        taps = _wide(weight).t().contiguous()
        for block in _blocks(pieces, x, len(taps)):
            y = taps.new_zeros(block.own.stop - block.own.start, x.shape[1])
            if bias is not None:
                y += bias
            for tap, own, seen in block.taps(len(taps)):
                y[own].addcmul_(_wide(x[seen]), taps[tap])
            out[block.own] = y
        ctx.pieces, ctx.biased = pieces, bias is not None
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps = _wide(weight).t().contiguous()
        grad_taps, grad_x = torch.zeros_like(taps), torch.zeros(x.shape, dtype=taps.dtype, device=x.device)
        for block in _blocks(ctx.pieces, x, len(taps)):
            wide = _wide(grad[block.own])
            for tap, own, seen in block.taps(len(taps)):
                grad_x[seen].addcmul_(wide[own], taps[tap])
                grad_taps[tap] += (wide[own] * _wide(x[seen])).sum(0)
        grad_bias = _wide(grad).sum(0).to(weight.dtype) if ctx.biased else None
        return grad_x.to(x.dtype), grad_taps.t().to(weight.dtype), grad_bias, None


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    """See ``weft.ops.conv.depthwise``."""
    return _Depthwise.apply(x, weight, bias, pieces)
