"""Attention of pieces to their whole sequences: a readable form, and ``scaled_dot_product_attention``.

Pieces that are alike and follow one another are one batch. With a bias, scores of one block of queries exist
at a time and are made again in the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from weft.ops.blocks import blocks
from weft.plan.items import Piece

Bias = Callable[[int, slice], Tensor]
SCORES = 2**22  # numbers of one block of scores under a bias


def _apart(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[Tensor, ...]]:
    """Queries, keys and values of each piece."""
    queries, keys = [piece.rows for piece in pieces], [piece.whole for piece in pieces]
    yield from zip(q.split(queries), k.split(keys), v.split(keys), strict=True)


def attend_slowly(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, bias: Bias | None
) -> Tensor:
    """See ``weft.ops.attention.attend_pieces``: all scores of a piece at once, in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = [_joined(q, k, v)]
    for i, (own_q, own_k, own_v) in enumerate(_apart(q, k, v, pieces)):
        scores = torch.einsum("ihd,jhd->hij", own_q.to(wide), own_k.to(wide)) * scale
        if bias is not None and len(own_q):
            scores = scores + bias(i, slice(0, len(own_q)))
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), own_v.to(wide)).to(q.dtype))
    return torch.cat(out)


def attend(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, bias: Bias | None
) -> Tensor:
    """See ``weft.ops.attention.attend_pieces``."""
    out = _in_batches(q, k, v, pieces, scale) if bias is None else _biased(q, k, v, pieces, scale, bias)
    if len(out) == 1:
        return out[0]
    return torch.cat(out) if out else _joined(q, k, v)


def _joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No rows, with gradients (of no rows) for all three."""
    return q[:0] + k[:0] + v[:0]


def _in_batches(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float) -> list[Tensor]:
    out, query, key = [], 0, 0
    for (rows, whole), alike in groupby((piece.rows, piece.whole) for piece in pieces):
        count = len(list(alike))
        if rows:
            own_q = _heads(q[query : query + count * rows], count)
            own_k, own_v = (_heads(t[key : key + count * whole], count) for t in (k, v))
            y = F.scaled_dot_product_attention(own_q, own_k, own_v, scale=scale)
            out.append(y.transpose(1, 2).flatten(0, 1))
        query, key = query + count * rows, key + count * whole
    return out


def _biased(
    q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float, bias: Bias
) -> list[Tensor]:
    out = []
    for i, (own_q, own_k, own_v) in enumerate(_apart(q, k, v, pieces)):
        for rows in blocks(len(own_q), max(1, SCORES // max(1, own_k.shape[0] * own_k.shape[1]))):
            given = own_q[rows], own_k, own_v, i, rows, scale, bias
            if torch.is_grad_enabled():
                y = checkpoint(_block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                y = _block(*given)
            out.append(y)
    return out


def _block(q: Tensor, k: Tensor, v: Tensor, piece: int, rows: slice, scale: float, bias: Bias) -> Tensor:
    """Some queries of a piece."""
    own_q, own_k, own_v = (_heads(t, 1) for t in (q, k, v))
    added = bias(piece, rows).to(q.dtype).unsqueeze(0)
    return F.scaled_dot_product_attention(own_q, own_k, own_v, added, scale=scale)[0].transpose(0, 1)


def _heads(t: Tensor, count: int) -> Tensor:
    """Rows of ``count`` pieces as ``[pieces, heads, rows, head_dim]``."""
    return t.unflatten(0, (count, -1)).transpose(1, 2)
