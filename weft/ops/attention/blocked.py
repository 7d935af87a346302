"""Attention for CPUs: blocks of queries against all keys before them, as batched matrix products.

The heads that share keys are rows of one product, so keys and values are never repeated. Scores of one
block exist at a time and are made again in the backward pass. Measured (one thread, fp32, 8 query heads,
forward and backward of 4096 tokens, ms, against ``scaled_dot_product_attention``):

    kv heads, head_dim     2, 32       2, 64       2, 128      8, 64
    512 tokens each        78 / 114    132 / 193   233 / 364   164 / 209
    2048 tokens each       255 / 279   435 / 470   780 / 841   495 / 476
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.blocks import blocks
from weft.ops.segments import Segments

QUERY_ROWS = 256  # query heads times tokens in one block
SCORES = 2**21  # numbers of one block over a batch of segments


class _Batch(NamedTuple):
    """Equally long neighbours. Dimensions: segments s, tokens l, kv heads k, heads of one r, head_dim d."""

    tokens: slice
    length: int
    kv_heads: int

    def rows(self, t: Tensor) -> Tensor:
        """``[tokens, heads, d]`` to ``[(s k), (l r), d]``, contiguous."""
        return (
            self.apart(t).transpose(1, 2).reshape(-1, self.length * t.shape[1] // self.kv_heads, t.shape[2])
        )

    def apart(self, t: Tensor) -> Tensor:
        """The batch's tokens of ``t`` as ``[s, l, k, r, d]``."""
        return t[self.tokens].unflatten(0, (-1, self.length)).unflatten(2, (self.kv_heads, -1))

    def write(self, rows: Tensor, out: Tensor) -> None:
        """The way back, into the batch's tokens of ``out``."""
        to = self.apart(out)
        to.copy_(rows.view(to.shape[0], to.shape[2], self.length, *to.shape[3:]).transpose(1, 2))


def _batches(segments: Segments, kv_heads: int) -> Iterator[_Batch]:
    start = 0
    for length, alike in groupby(segments.lengths):
        count = len(list(alike))
        step = max(1, SCORES // max(1, kv_heads * QUERY_ROWS * length))
        for part in blocks(count if length else 0, step):
            yield _Batch(slice(start + part.start * length, start + part.stop * length), length, kv_heads)
        start += count * length


class _Queries(NamedTuple):
    """One block of queries of every segment of a batch, and the keys it sees."""

    rows: slice
    keys: slice
    mask: Tensor  # what to add to the scores of the block's own keys

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax of the block's scores; ``q`` is scaled already."""
        scores = torch.bmm(q[:, self.rows], k[:, self.keys].transpose(1, 2))
        scores[:, :, self.keys.stop - self.mask.shape[1] :].add_(self.mask)
        return torch.softmax(scores, dim=-1, out=scores)


def _queries(length: int, repeat: int, like: Tensor) -> Iterator[_Queries]:
    step = min(128, max(16, QUERY_ROWS // repeat))
    for part in blocks(length, step):
        own = part.stop - part.start
        mask = like.new_full((own, own), float("-inf")).triu_(1).repeat_interleave(repeat, 0)
        yield _Queries(slice(part.start * repeat, part.stop * repeat), slice(0, part.stop), mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        out = q.new_empty(q.shape)
        for batch in _batches(segments, k.shape[1]):
            own_q, own_k, own_v = batch.rows(q).mul(scale), batch.rows(k), batch.rows(v)
            y = torch.empty_like(own_q)
            for block in _queries(batch.length, q.shape[1] // k.shape[1], q):
                y[:, block.rows] = torch.bmm(block.weights(own_q, own_k), own_v[:, block.keys])
            batch.write(y, out)
        ctx.segments, ctx.scale = segments, scale
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grads = [t.new_empty(t.shape) for t in (q, k, v)]
        dots = (grad * out).sum(-1, keepdim=True)
        for batch in _batches(ctx.segments, k.shape[1]):
            own_q, *others = (batch.rows(t) for t in (q, k, v, grad, dots))
            own = _backward(batch, q.shape[1] // k.shape[1], own_q * ctx.scale, *others)
            for rows, to in zip(own, grads, strict=True):
                batch.write(rows, to)
        return grads[0].mul_(ctx.scale), grads[1], grads[2], None, None


def _backward(
    batch: _Batch, repeat: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, dots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled q, k, v. ``dots`` is the product of outputs and their gradients, summed over d."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in _queries(batch.length, repeat, q):
        rows, keys, weights = block.rows, block.keys, block.weights(q, k)
        own = grad[:, rows]
        grad_v[:, keys] += torch.bmm(weights.transpose(1, 2), own)
        scores = torch.bmm(own, v[:, keys].transpose(1, 2)).sub_(dots[:, rows]).mul_(weights)
        grad_q[:, rows] = torch.bmm(scores, k[:, keys])
        grad_k[:, keys] += torch.bmm(scores.transpose(1, 2), q[:, rows])
    return grad_q, grad_k, grad_v


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See ``weft.ops.attention.attend``."""
    return _Attention.apply(q, k, v, segments, scale)
