"""The convolution as shifted multiply-adds, channels last, over blocks of rows that stay in the cache.

Only inputs are kept: the backward pass makes the values before the SiLU again, block by block.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.ops.blocks import block_rows, blocks
from weft.ops.segments import Segments

BLOCK_NUMBERS = 2**19  # of x: a few such arrays fit the caches
# A block's inputs, and those before its segments if any: [segments, rows, channels].
Parts = tuple[Tensor, ...]


class _Block(NamedTuple):
    """Rows ``start`` to ``stop`` of some equally long, neighbouring segments."""

    tokens: slice
    segments: slice
    start: int
    stop: int

    def split(self, x: Tensor) -> Tensor:
        """``[tokens, channels]`` of the block's segments as ``[segments, rows, channels]``, all rows."""
        return x[self.tokens].unflatten(0, (self.segments.stop - self.segments.start, -1))

    def reach(self, taps: int, before: bool) -> Iterator[tuple[int, int, slice, slice]]:
        """(tap, 0 for x or 1 for the inputs before, rows of the block, rows that this tap multiplies)."""
        for shift in range(taps):
            tap, first = taps - 1 - shift, max(shift - self.start, 0)
            if first < self.stop - self.start:
                own = slice(first, self.stop - self.start)
                yield tap, 0, own, slice(self.start + first - shift, self.stop - shift)
            if first and before:
                count = min(first, self.stop - self.start)
                yield tap, 1, slice(0, count), slice(tap, tap + count)


def _blocks(segments: Segments, x: Tensor, taps: int) -> Iterator[_Block]:
    """Blocks of about ``BLOCK_NUMBERS`` numbers, in order."""
    # No block is shorter than the taps, so that it reaches back into one other at most.
    rows = max(block_rows(x.device, x.shape[1], BLOCK_NUMBERS), 2 * taps)
    first = token = 0
    for length, alike in groupby(segments.lengths):
        count = len(list(alike))
        step = max(1, rows // max(length, 1))
        for at in range(0, count if length else 0, step):
            own = min(step, count - at)
            tokens = slice(token + at * length, token + (at + own) * length)
            for part in blocks(length, rows):
                yield _Block(tokens, slice(first + at, first + at + own), part.start, part.stop)
        first, token = first + count, token + count * length


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _parts(block: _Block, x: Tensor, before: Tensor | None) -> Parts:
    return (block.split(x),) if before is None else (block.split(x), before[block.segments])


def _before_silu(block: _Block, parts: Parts, taps: Tensor, bias: Tensor) -> Tensor:
    """``bias + conv``: ``[segments, rows, channels]``; ``taps`` is ``[taps, channels]``."""
    out = torch.addcmul(bias, _wide(parts[0][:, block.start : block.stop]), taps[-1])
    for tap, part, own, reached in block.reach(len(taps), len(parts) > 1):
        if tap < len(taps) - 1:
            out[:, own].addcmul_(_wide(parts[part][:, reached]), taps[tap])
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None, segments: Segments
    ) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        taps, wide_bias = _wide(weight).t().contiguous(), _wide(bias)
        for block in _blocks(segments, x, len(taps)):
            parts = _parts(block, x, before)
            y = _before_silu(block, parts, taps, wide_bias)
            block.split(out)[:, block.start : block.stop] = torch.ops.aten.silu_(y)
        ctx.segments = segments
        ctx.save_for_backward(x, weight, bias, before)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        taps, wide_bias = _wide(weight).t().contiguous(), _wide(bias)
        grad_taps, grad_bias = torch.zeros_like(taps), torch.zeros_like(wide_bias)
        grad_x = torch.empty(x.shape, dtype=taps.dtype, device=x.device)
        grad_before = None if before is None else torch.zeros_like(before, dtype=taps.dtype)
        for block in _blocks(ctx.segments, x, len(taps)):
            parts = _parts(block, x, before)
            grads = _parts(block, grad_x, grad_before)
            y = _before_silu(block, parts, taps, wide_bias)
            own_grad = _wide(block.split(grad)[:, block.start : block.stop])
            grad_y = torch.ops.aten.silu_backward(own_grad, y)
            grad_bias += grad_y.sum((0, 1))
            torch.mul(grad_y, taps[-1], out=grads[0][:, block.start : block.stop])
            for tap, part, own, reached in block.reach(len(taps), before is not None):
                grad_taps[tap] += (grad_y[:, own] * _wide(parts[part][:, reached])).sum((0, 1))
                if tap < len(taps) - 1:
                    grads[part][:, reached].addcmul_(grad_y[:, own], taps[tap])
        made: tuple[Tensor | None, ...] = grad_x, grad_taps.t(), grad_bias, grad_before
        return *(
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip(made, (x, weight, bias, before), strict=True)
        ), None


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, initial: Tensor | None, return_final: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``weft.ops.conv.causal_conv``."""
    before = None if initial is None else initial.to(x.dtype).transpose(1, 2).contiguous()
    y = _Conv.apply(x, weight, bias, before, segments)
    return (y, _final(x, weight.shape[1] - 1, segments, initial)) if return_final else y


def _final(x: Tensor, tail: int, segments: Segments, initial: Tensor | None) -> Tensor:
    """The last ``tail`` inputs of each segment, ``[segments, channels, tail]``."""
    final = []
    for s, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
        held = min(tail, length)
        own = x[start + length - held : start + length].t()
        if held < tail:
            older = (
                x.new_zeros(x.shape[1], tail - held) if initial is None else initial[s][:, held:].to(x.dtype)
            )
            own = torch.cat([older, own], dim=1)
        final.append(own)
    return torch.stack(final)


def conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``weft.ops.conv.conv_step``."""
    seen = torch.cat([state, x.to(state.dtype).unsqueeze(-1)], dim=-1)
    state.copy_(seen[..., 1:])
    return F.silu((seen * weight).sum(-1).add_(bias)).to(x.dtype)
