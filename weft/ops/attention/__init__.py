"""Attention (arXiv 1706.03762): causal inside documents (grouped: arXiv 2305.13245), whole in encoders."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from weft.ops.attention import fast, reference, runs, whole
from weft.ops.backend import pick
from weft.ops.segments import Segments
from weft.plan import items
from weft.plan.runs import Piece

BACKENDS = {"reference": reference.attend, "fast": fast.attend}
CACHED_BACKENDS = {"reference": reference.attend_cached, "fast": fast.attend_cached}
RUNS_BACKENDS = {"reference": runs.dense_attend, "fast": runs.attend}
PIECES_BACKENDS = {"reference": whole.attend_slowly, "fast": whole.attend}
RUNS_BACKWARD_BACKENDS = {"reference": runs.dense_backward, "fast": runs.attend_backward}


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


def attend_runs(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "keys kv_heads head_dim"],
    v: Float[Tensor, "keys kv_heads head_dim"],
    pieces: Sequence[Piece],
    scale: float,
    onto: tuple[Float[Tensor, "queries heads head_dim"], Float[Tensor, "queries heads"]] | None = None,
) -> tuple[Float[Tensor, "queries heads head_dim"], Float[Tensor, "queries heads"]]:
    """Attention of queries to the keys that ``pieces`` give them, and ``log(sum(exp(scores)))`` over these.

    Without gradient: ``attend_runs_backward`` is it. A query without keys has output 0 and -inf.

    Args:
        q: queries.
        k: keys.
        v: values.
        pieces: which keys each query sees; no pair twice.
        scale: factor on the scores.
        onto: outputs and sums of the same queries over other keys, to which these are joined (in place).

    Returns:
        Outputs and sums, in at least fp32.
    """
    return pick("attention", RUNS_BACKENDS)(q, k, v, pieces, scale, onto)


def attend_runs_backward(
    grad: Float[Tensor, "queries heads head_dim"],
    out: Float[Tensor, "queries heads head_dim"],
    lse: Float[Tensor, "queries heads"],
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "keys kv_heads head_dim"],
    v: Float[Tensor, "keys kv_heads head_dim"],
    pieces: Sequence[Piece],
    scale: float,
) -> tuple[
    Float[Tensor, "queries heads head_dim"],
    Float[Tensor, "keys kv_heads head_dim"],
    Float[Tensor, "keys kv_heads head_dim"],
]:
    """What ``pieces`` add to the gradients of q, k and v, in at least fp32.

    ``out`` and ``lse`` are the final ones of the queries, over all their keys; ``grad`` is that of ``out``.
    """
    return pick("attention", RUNS_BACKWARD_BACKENDS)(grad, out, lse, q, k, v, pieces, scale)


def attend_pieces(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "keys heads head_dim"],
    v: Float[Tensor, "keys heads head_dim"],
    pieces: Sequence[items.Piece],
    scale: float,
    bias: whole.Bias | None = None,
) -> Float[Tensor, "queries heads head_dim"]:
    """``softmax(scale q k^T + bias) v`` of the rows of each piece over all rows of its sequence, both ways.

    Args:
        q: queries: the rows of the pieces, one after another.
        k: keys: the whole sequence of each piece, one after another (``Pieces.reach(None)``).
        v: values of the same rows.
        pieces: what is here; none, or pieces without rows, are allowed.
        scale: factor on the scores.
        bias: ``bias(i, rows)`` is added to the scores of these queries of piece ``i``, counted from the
            piece's first: ``[heads, queries, keys]``, with gradients. It is called once or more for each
            block of queries, and again in the backward pass.
    """
    return pick("attention", PIECES_BACKENDS)(q, k, v, pieces, scale, bias)
