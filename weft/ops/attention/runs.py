"""Attention of runs of queries to runs of keys, block of rows by block, with what joins the parts.

Softmax over keys that come in parts (arXiv 1805.02867): each part gives its output and the logarithm of its
sum of exponentials (``lse``), and two parts of the same queries join as

    lse = log(exp(lse_1) + exp(lse_2)),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Given the final ``out`` and ``lse``, the gradient is a plain sum over parts. As in ``blocked``, the heads that
share keys are rows of one product, and the scores of one block exist at a time. Everything is computed and
summed in at least fp32.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weft.ops.blocks import blocks
from weft.plan.runs import Piece

QUERY_ROWS = 256  # query heads times tokens in one block, on a CPU
SCORES = 2**21  # numbers of one block over a batch of pieces
ACCELERATOR_ROWS = 4096  # query heads times tokens in one block elsewhere


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


class _Batch(NamedTuple):
    """Equal pieces whose rows follow one another.

    Dimensions: pieces s, rows l, kv heads k, heads of one r, head_dim d.
    """

    first: Piece
    pieces: int
    kv_heads: int

    def queries(self, t: Tensor) -> Tensor:
        """The batch's rows of ``t`` as a view ``[s, k, l, r, d]``."""
        return self._view(t, self.first.queries.start, self.first.queries.length)

    def keys(self, t: Tensor) -> Tensor:
        """The same of keys or values, ``r`` = 1."""
        return self._view(t, self.first.keys.start, self.first.keys.length)

    def _view(self, t: Tensor, start: int, length: int) -> Tensor:
        rows = t[start : start + self.pieces * length]
        return rows.unflatten(0, (self.pieces, length)).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)


def _rows(view: Tensor) -> Tensor:
    """``[(s k), (l r), d]``, in the dtype of sums."""
    return view.flatten(0, 1).flatten(1, 2).to(_wide(view))


def _batches(pieces: Sequence[Piece], kv_heads: int, repeat: int) -> Iterator[_Batch]:
    first = 0
    for i in range(1, len(pieces) + 1):
        last = pieces[i - 1]
        if i < len(pieces) and _follows(last, pieces[i]):
            numbers = kv_heads * min(QUERY_ROWS, last.queries.length * repeat) * last.keys.length
            if (i - first + 1) * numbers <= SCORES:
                continue
        yield _Batch(pieces[first], i - first, kv_heads)
        first = i


def _follows(last: Piece, piece: Piece) -> bool:
    def after(p: Piece) -> tuple[int, int, int, int, int]:
        return (p.queries.stop, p.keys.stop, p.queries.length, p.keys.length, p.diagonal)

    starts = (piece.queries.start, piece.keys.start)
    return after(last) == (*starts, piece.queries.length, piece.keys.length, piece.diagonal)


class _Block(NamedTuple):
    """Some queries of a piece and the keys they see; ``mask`` is added to the scores of the last of these."""

    rows: slice
    keys: slice
    mask: Tensor | None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``q`` is scaled already."""
        scores = torch.bmm(q[:, self.rows], k[:, self.keys].transpose(1, 2))
        if self.mask is not None:
            scores[:, :, self.keys.stop - self.mask.shape[1] :].add_(self.mask)
        return scores


def _step(device: torch.device, repeat: int) -> int:
    """Queries of one block."""
    match device.type:
        case "cpu":
            return min(128, max(16, QUERY_ROWS // repeat))
        case "meta":
            return 2**62
        case _:
            return max(128, ACCELERATOR_ROWS // repeat)


def _blocks(piece: Piece, repeat: int, like: Tensor) -> Iterator[_Block]:
    for part in blocks(piece.queries.length, _step(like.device, repeat)):
        stop = min(piece.keys.length, part.stop + piece.diagonal)
        masked = max(0, stop - (part.start + piece.diagonal + 1))  # keys that the block's first query misses
        mask = None
        if masked:
            mask = like.new_full((part.stop - part.start, masked), float("-inf")).triu_()
            mask = mask.repeat_interleave(repeat, 0)
        yield _Block(slice(part.start * repeat, part.stop * repeat), slice(0, stop), mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, onto: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See ``weft.ops.attention.attend_runs``."""
    out, lse = onto or (q.new_zeros(q.shape, dtype=_wide(q)), _no_keys(q))
    repeat, done = q.shape[1] // k.shape[1], len(q) if onto else 0
    for batch in _batches(pieces, k.shape[1], repeat):
        own_q, own_k, own_v = _rows(batch.queries(q)) * scale, _rows(batch.keys(k)), _rows(batch.keys(v))
        y, sums = torch.empty_like(own_q), own_q.new_empty(own_q.shape[:2])
        for block in _blocks(batch.first, repeat, own_q):
            scores = block.scores(own_q, own_k)
            most = scores.amax(-1, keepdim=True)
            weights = scores.sub_(most).exp_()
            total = weights.sum(-1, keepdim=True)
            y[:, block.rows] = torch.bmm(weights, own_v[:, block.keys]).div_(total)
            sums[:, block.rows] = total.log_().add_(most).squeeze(-1)
        parts = batch.queries(out), batch.queries(lse.unsqueeze(-1))
        if batch.first.queries.start >= done:  # the first keys of these queries
            parts[0].copy_(y.view(parts[0].shape))
            parts[1].copy_(sums.view(parts[1].shape))
        else:
            _join(*parts, y, sums)
        done = max(done, batch.first.queries.start + batch.pieces * batch.first.queries.length)
    return out, lse


def _no_keys(q: Tensor) -> Tensor:
    return q.new_full(q.shape[:2], float("-inf"), dtype=_wide(q))


def _join(out: Tensor, lse: Tensor, y: Tensor, sums: Tensor) -> None:
    """Join a part to what the views ``out`` and ``lse`` hold."""
    sums = sums.view(lse.shape)
    both = torch.logaddexp(lse, sums)
    out.mul_((lse - both).exp_()).add_(y.view(out.shape) * (sums - both).exp_())
    lse.copy_(both)


def attend_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``weft.ops.attention.attend_runs_backward``."""
    grads = tuple(t.new_zeros(t.shape, dtype=_wide(t)) for t in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    dots = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
    for batch in _batches(pieces, k.shape[1], repeat):
        rows = [_rows(batch.queries(t)) for t in (q, grad, dots, lse.unsqueeze(-1))]
        own = _backward(batch.first, repeat, rows, _rows(batch.keys(k)), _rows(batch.keys(v)), scale)
        for view, part in zip((batch.queries(grads[0]), *map(batch.keys, grads[1:])), own, strict=True):
            view.add_(part.view(view.shape))
    return grads[0], grads[1], grads[2]


def _backward(
    piece: Piece, repeat: int, rows: list[Tensor], k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; ``rows``: q, gradients of outputs, their products with outputs, lse."""
    q, grad, dots, lse = rows
    q = q * scale
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in _blocks(piece, repeat, q):
        own, keys = block.rows, block.keys
        weights = block.scores(q, k).sub_(lse[:, own]).exp_()
        grad_v[:, keys] += torch.bmm(weights.transpose(1, 2), grad[:, own])
        scores = torch.bmm(grad[:, own], v[:, keys].transpose(1, 2)).sub_(dots[:, own]).mul_(weights)
        grad_q[:, own] = torch.bmm(scores, k[:, keys])
        grad_k[:, keys] += torch.bmm(scores.transpose(1, 2), q[:, own])
    return grad_q.mul_(scale), grad_k, grad_v


def dense_attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, onto: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The readable twin of ``attend``: all scores at once; autograd can go through it."""
    scores, seen = _scores(q, k, pieces, scale)
    some = seen.any(1)[None, :, None]
    lse = torch.logsumexp(scores.masked_fill(~some, 0.0), -1, keepdim=True)
    weights = (scores - lse).exp()
    out = torch.einsum("hij,jhd->ihd", weights, _repeated(v, q).to(weights.dtype))
    lse = lse.masked_fill(~some, float("-inf")).squeeze(-1).t()
    if onto is None:
        return out, lse
    both = torch.logaddexp(onto[1], lse)
    first, second = ((part - both).exp().nan_to_num(0.0).unsqueeze(-1) for part in (onto[1], lse))
    return onto[0] * first + out * second, both


def dense_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The readable twin of ``attend_backward``."""
    scores, seen = _scores(q, k, pieces, scale)
    wide = scores.dtype
    weights = (scores - lse.t().unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    grad = grad.to(wide)
    inner = torch.einsum("ihd,jhd->hij", grad, _repeated(v, q).to(wide))
    inner = (inner - (grad * out).sum(-1).t().unsqueeze(-1)) * weights * scale
    of_q = torch.einsum("hij,jhd->ihd", inner, _repeated(k, q).to(wide))
    of_k = torch.einsum("hij,ihd->jhd", inner, q.to(wide)).unflatten(1, (k.shape[1], -1)).sum(2)
    of_v = torch.einsum("hij,ihd->jhd", weights, grad).unflatten(1, (k.shape[1], -1)).sum(2)
    return of_q, of_k, of_v


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    return t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, pieces: Sequence[Piece], scale: float) -> tuple[Tensor, Tensor]:
    """``[heads, queries, keys]``, -inf where unseen, and which are seen."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    for queries, keys, diagonal in pieces:
        block = seen[queries.start : queries.stop, keys.start : keys.stop]
        block |= torch.ones_like(block).tril(diagonal)
    scores = torch.einsum("ihd,jhd->hij", q.to(_wide(q)), _repeated(k, q).to(_wide(k))) * scale
    return scores.masked_fill(~seen, float("-inf")), seen
