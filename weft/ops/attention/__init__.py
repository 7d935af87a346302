"""Causal grouped-query attention inside documents (arXiv 1706.03762; grouped: arXiv 2305.13245)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from weft.ops.attention import fast, reference
from weft.ops.backend import pick
from weft.ops.segments import Segments

BACKENDS = {"reference": reference.attend, "fast": fast.attend}
CACHED_BACKENDS = {"reference": reference.attend_cached, "fast": fast.attend_cached}


def attend(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    segments: Segments,
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """``softmax(scale q k^T) v`` over the tokens up to each one in its own segment."""
    return pick("attention", BACKENDS)(q, k, v, segments, scale)


def attend_cached(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens kv_heads head_dim"],
    v: Float[Tensor, "tokens kv_heads head_dim"],
    keys: Float[Tensor, "seqs kv_heads places head_dim"],
    values: Float[Tensor, "seqs kv_heads places head_dim"],
    segments: Segments,
    past: Sequence[int],
    scale: float,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of new tokens to all tokens up to each one, for inference.

    Writes ``k`` and ``v`` into ``keys`` and ``values`` (in place) at places ``past[s]`` and up.

    Args:
        q: queries of the new tokens.
        k: keys of the new tokens.
        v: values of the new tokens.
        keys: cached keys; only the first ``past[s]`` places of sequence s are read.
        values: cached values.
        segments: how many new tokens each sequence has (0 is allowed).
        past: tokens of each sequence already in the cache.
        scale: factor on the scores.
    """
    return pick("attention", CACHED_BACKENDS)(q, k, v, keys, values, segments, past, scale)
