"""The convolution, one document at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.segments import Segments


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
