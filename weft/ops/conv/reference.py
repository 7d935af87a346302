"""The convolutions, one document or piece at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.segments import Segments
from weft.plan.items import Piece, reach


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, segments: Segments, initial: Tensor | None, return_final: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``weft.ops.conv.causal_conv``."""
    channels, taps = weight.shape
    out, final = [], []
    for s, own in enumerate(x.split(list(segments.lengths))):
        before = initial[s] if initial is not None else x.new_zeros(channels, taps - 1)
        seen = torch.cat([before.to(x.dtype), own.t()], dim=1)
        if len(own):
            y = F.conv1d(seen.unsqueeze(0), weight.unsqueeze(1), bias, groups=channels).squeeze(0)
            out.append(F.silu(y).t())
        final.append(seen[:, seen.shape[1] - taps + 1 :])
    return (torch.cat(out), torch.stack(final)) if return_final else torch.cat(out)


def conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``weft.ops.conv.conv_step``."""
    y, final = causal_conv(x, weight, bias, Segments((1,) * len(x)), state, return_final=True)
    state.copy_(final)
    return y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    """See ``weft.ops.conv.depthwise``."""
    channels, taps = weight.shape
    half = taps // 2
    around = [reach(piece, half) for piece in pieces]
    out = [x.new_zeros(0, channels)]
    for piece, wide, own in zip(pieces, around, x.split([p.rows for p in around]), strict=True):
        missing = half - (piece.start - wide.start), half - (wide.stop - piece.stop)
        seen = F.pad(own.t().unsqueeze(0), missing)
        if piece.rows:
            y = F.conv1d(seen.to(weight.dtype), weight.unsqueeze(1), bias, groups=channels)
            out.append(y.squeeze(0).t().to(x.dtype))
    return torch.cat(out)
