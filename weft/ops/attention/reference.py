"""Attention with explicit scores, one document at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.ops.segments import Segments


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Queries are the last ``len(q)`` of ``k``: ``[new, heads, dim]`` over ``[all, kv_heads, dim]``."""
    repeat = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(repeat, dim=1).to(wide), v.repeat_interleave(repeat, dim=1).to(wide)
    scores = torch.einsum("ihd,jhd->hij", q.to(wide), k) * scale
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(~seen.tril(k.shape[0] - q.shape[0]), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See ``weft.ops.attention.attend``."""
    lengths = list(segments.lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_softmax_attention(*part, scale) for part in parts])


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
    lengths = list(segments.lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    out = []
    for s, (own_q, own_k, own_v) in enumerate(parts):
        end = past[s] + lengths[s]
        keys[s, :, past[s] : end] = own_k.transpose(0, 1)
        values[s, :, past[s] : end] = own_v.transpose(0, 1)
        seen_k, seen_v = keys[s, :, :end].transpose(0, 1), values[s, :, :end].transpose(0, 1)
        out.append(_softmax_attention(own_q, seen_k, seen_v, scale))
    return torch.cat(out)
