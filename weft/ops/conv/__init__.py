"""Depthwise convolutions: causal with SiLU, as in Mamba-2 (arXiv 2405.21060, section 7), and over pieces."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.conv import around, fast, reference
from weft.ops.segments import Segments
from weft.plan.items import Piece

BACKENDS = {"reference": reference.causal_conv, "fast": fast.causal_conv}
STEP_BACKENDS = {"reference": reference.conv_step, "fast": fast.conv_step}
PIECES_BACKENDS = {"reference": reference.depthwise, "fast": around.depthwise}


def causal_conv(
    x: Float[Tensor, "tokens channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"],
    segments: Segments,
    initial: Float[Tensor, "segments channels tail"] | None = None,
    return_final: bool = False,
) -> (
    Float[Tensor, "tokens channels"]
    | tuple[Float[Tensor, "tokens channels"], Float[Tensor, "segments channels tail"]]
):
    """``silu(bias + sum_k weight[:, k] x[t - taps + 1 + k])`` inside each segment.

    Args:
        x: inputs.
        weight: taps, oldest first.
        bias: added before the SiLU.
        segments: documents.
        initial: the ``taps - 1`` inputs before each segment, oldest first; zeros without it.
        return_final: also return the last ``taps - 1`` inputs of each segment.
    """
    return pick("conv", BACKENDS)(x, weight, bias, segments, initial, return_final)


def conv_step(
    state: Float[Tensor, "seqs channels tail"],
    x: Float[Tensor, "seqs channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"],
) -> Float[Tensor, "seqs channels"]:
    """``causal_conv`` of one token per sequence; ``state`` (the last inputs) moves on in place."""
    return pick("conv", STEP_BACKENDS)(state, x, weight, bias)


def depthwise(
    x: Float[Tensor, "around channels"],
    weight: Float[Tensor, "channels taps"],
    bias: Float[Tensor, " channels"] | None,
    pieces: Sequence[Piece],
) -> Float[Tensor, "rows channels"]:
    """``bias + sum_k weight[:, k] x[t - taps // 2 + k]`` for the rows t of each piece; zeros past a sequence.

    Args:
        x: rows of ``reach(piece, taps // 2)`` of each piece.
        weight: an odd number of taps, in the order of the rows.
        bias: added, if there is one.
        pieces: which rows come out; several may be of one sequence.
    """
    return pick("conv", PIECES_BACKENDS)(x, weight, bias, pieces)
