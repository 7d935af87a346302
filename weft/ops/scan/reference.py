"""The recurrence, token by token."""

import torch
from torch import Tensor

from weft.ops.segments import Segments


def _recur(h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One token: state ``[heads, head_dim, state]`` and output ``[heads, head_dim]``."""
    heads_per_group = x.shape[0] // B.shape[0]
    B, C = B.repeat_interleave(heads_per_group, 0), C.repeat_interleave(heads_per_group, 0)
    h = (dt * A).exp()[:, None, None] * h + (dt[:, None] * x).unsqueeze(-1) * B.unsqueeze(1)
    return h, (h * C.unsqueeze(1)).sum(-1)


def ssd(  # noqa: PLR0913
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    segments: Segments,
    chunk: int,
    initial: Tensor | None,
    return_final: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``weft.ops.scan.ssd``; ``chunk`` is not used."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xw, dt, A, B, C, D = (t.to(wide) for t in (x, dt, A, B, C, D))
    out, final = [], []
    for s, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
        h = xw.new_zeros(*x.shape[1:], B.shape[-1]) if initial is None else initial[s].to(wide)
        for t in range(start, start + length):
            h, y = _recur(h, xw[t], dt[t], A, B[t], C[t])
            out.append(y + D[:, None] * xw[t])
        final.append(h)
    y = torch.stack(out).to(x.dtype)
    return (y, torch.stack(final)) if return_final else y


def ssd_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """See ``weft.ops.scan.ssd_step``."""
    y, final = ssd(x, dt, A, B, C, D, Segments((1,) * len(x)), 1, state, return_final=True)
    state.copy_(final)
    return y
