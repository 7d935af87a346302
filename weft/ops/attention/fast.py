"""Attention in blocks on CPUs, else ``scaled_dot_product_attention`` over runs of equally long documents."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.attention.blocked import attend_in_blocks
from weft.ops.segments import Segments


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """``[batch, heads, new, dim]`` over ``[batch, kv_heads, all, dim]``."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal, enable_gqa=grouped)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See ``weft.ops.attention.attend``."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        return attend_in_blocks(q, k, v, segments, scale)
    out, start = [], 0
    for length, run in groupby(segments.lengths):
        count = len(list(run))
        end = start + count * length
        heads = [x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        start = end
        if length:
            out.append(_sdpa(*heads, scale, causal=True).transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if len(out) != 1 else out[0]


def _runs(lengths: Sequence[int], past: Sequence[int]) -> Iterator[tuple[int, int, int, int, int]]:
    """(first sequence, end, first token, new tokens each, past each) of neighbours that are alike."""
    first = token = 0
    for (new, held), run in groupby(zip(lengths, past, strict=True)):
        count = len(list(run))
        if new:
            yield first, first + count, token, new, held
        first, token = first + count, token + count * new


def _mask(new: int, held: int, device: torch.device) -> Tensor | None:
    """Which of ``held + new`` keys each of ``new`` queries sees; None: all of them."""
    if new == 1:
        return None
    return torch.ones(new, held + new, dtype=torch.bool, device=device).tril_(held)


def attend_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Segments,
    past: Sequence[int],
    scale: float,
) -> Tensor:
    """See ``weft.ops.attention.attend_cached``."""
    if segments.uniform == 1 and len(set(past)) > 1:
        return _decode_ragged(q, k, v, keys, values, past, scale)
    out = torch.empty_like(q)
    for first, end, token, new, held in _runs(segments.lengths, past):
        rows = slice(token, token + (end - first) * new)
        own_q, own_k, own_v = (x[rows].unflatten(0, (end - first, new)).transpose(1, 2) for x in (q, k, v))
        keys[first:end, :, held : held + new] = own_k
        values[first:end, :, held : held + new] = own_v
        seen_k, seen_v = keys[first:end, :, : held + new], values[first:end, :, : held + new]
        if new == 1:
            out[rows] = _one_query(own_q.squeeze(2), seen_k, seen_v, scale)
            continue
        y = _sdpa(own_q, seen_k, seen_v, scale, _mask(new, held, q.device) if held else None, causal=not held)
        out[rows] = y.transpose(1, 2).flatten(0, 1)
    return out


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """``[batch, heads, dim]`` over ``[batch, kv_heads, all, dim]``: the heads of a group are its queries.

    While decoding 8 sequences of 192 keys it takes half the time of the grouped form (0.22 ms against 0.44).
    """
    grouped = q.unflatten(1, (k.shape[1], -1))
    return _sdpa(grouped, k, v, scale, mask).flatten(1, 2)


def _decode_ragged(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, past: Sequence[int], scale: float
) -> Tensor:
    """One new token for each of several sequences of different lengths: one padded call."""
    at = torch.tensor(past, device=q.device)
    rows = torch.arange(len(past), device=q.device)
    keys[rows, :, at] = k
    values[rows, :, at] = v
    places = max(past) + 1
    seen = torch.arange(places, device=q.device) <= at.unsqueeze(1)
    # A place beyond the end may hold anything, even NaN, and 0 * NaN is NaN; caches start as zeros.
    mask = seen[:, None, None, :]
    return _one_query(q, keys[:, :, :places], values[:, :, :places], scale, mask)
