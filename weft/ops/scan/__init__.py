"""Mamba-2 state space scan (Dao and Gu 2024, arXiv 2405.21060, sections 6 and 7)."""

from jaxtyping import Float
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.scan import across as _across
from weft.ops.scan import fast, reference
from weft.ops.segments import Segments

BACKENDS = {"reference": reference.ssd, "fast": fast.ssd}
STEP_BACKENDS = {"reference": reference.ssd_step, "fast": fast.ssd_step}
ACROSS_BACKENDS = {"reference": _across.reference, "fast": _across.fast}


def ssd(  # noqa: PLR0913
    x: Float[Tensor, "tokens heads head_dim"],
    dt: Float[Tensor, "tokens heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "tokens groups state"],
    C: Float[Tensor, "tokens groups state"],
    D: Float[Tensor, " heads"],
    segments: Segments,
    chunk: int,
    initial: Float[Tensor, "segments heads head_dim state"] | None = None,
    return_final: bool = False,
) -> (
    Float[Tensor, "tokens heads head_dim"]
    | tuple[Float[Tensor, "tokens heads head_dim"], Float[Tensor, "segments heads head_dim state"]]
):
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t`` inside each segment.

    Args:
        x: inputs.
        dt: time steps, positive.
        A: decay rates, negative.
        B: input directions; heads are shared out over groups in order.
        C: output directions.
        D: skip factors.
        segments: documents.
        chunk: tokens per chunk (speed only).
        initial: state before the first token of each segment; zeros without it.
        return_final: also return the state after the last token of each segment.

    States are fp32 (fp64 for fp64). Everything, states too, carries gradient.
    """
    return pick("scan", BACKENDS)(x, dt, A, B, C, D, segments, chunk, initial, return_final)


def ssd_step(
    state: Float[Tensor, "seqs heads head_dim state"],
    x: Float[Tensor, "seqs heads head_dim"],
    dt: Float[Tensor, "seqs heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "seqs groups state"],
    C: Float[Tensor, "seqs groups state"],
    D: Float[Tensor, " heads"],
) -> Float[Tensor, "seqs heads head_dim"]:
    """``ssd`` of one token per sequence, for inference; ``state`` moves on in place."""
    return pick("scan", STEP_BACKENDS)(state, x, dt, A, B, C, D)


def across(
    dt: Float[Tensor, "tokens heads"],
    A: Float[Tensor, " heads"],
    C: Float[Tensor, "tokens groups state"],
    state: Float[Tensor, "heads head_dim state"],
) -> Float[Tensor, "tokens heads head_dim"]:
    """What ``state``, before the first token, adds to each output: ``exp(sum_{s <= t} dt_s A) C_t . state``.

    For the tokens of one document: ``ssd`` from an initial state is ``ssd`` from zero plus this. Everything
    carries gradient; the result is fp32 (fp64 for fp64).
    """
    return pick("scan", ACROSS_BACKENDS)(dt, A, C, state)
