"""The chunked scan as matrix products, with a hand-written gradient.

In one chunk of ``q`` tokens, with ``cum`` the running sum of ``dt A`` inside it:

    decay[i, j] = exp(cum_i - cum_j) for j <= i,  rise_i = exp(cum_i),  fall_j = exp(cum_q - cum_j)
    y_i = sum_{j <= i} (C_i . B_j) decay[i, j] dt_j x_j + rise_i C_i . h + D x_i
    h'  = rise_q h + sum_j fall_j dt_j x_j B_j^T

Work goes group by group over blocks of chunks small enough for the cache. Inside a block states are
``[.., state, heads * dim]``: one product serves all heads of the group, so B and C are never repeated.
Inputs, outputs and the states between chunks are kept; the matrices inside chunks are made again.
"""

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.scan.chunks import Block, make_blocks
from weft.ops.segments import Segments

BLOCK_NUMBERS = 2**18  # of x, for one group and block: a few such arrays fit the second-level cache


def _exp_(t: Tensor) -> Tensor:
    """``exp`` in place of numbers <= 0; others count as 0.

    What would underflow counts as about the least normal number: MKL takes ten times as long to underflow.
    """
    return t.clamp_(log(torch.finfo(t.dtype).tiny) + 1, 0).exp_()


class _Part(NamedTuple):
    """One group in one block. Dimensions: chunks c, tokens q, heads h, head_dim p, state n."""

    x: Tensor  # c q h p
    dt: Tensor  # c q h
    cum: Tensor  # c q h
    B: Tensor  # c q n
    C: Tensor  # c q n
    D: Tensor  # h

    def rise(self) -> Tensor:
        return _exp_(self.cum.clone()).unsqueeze(-1)

    def fall(self) -> Tensor:
        return _exp_(self.cum[:, -1:] - self.cum).unsqueeze(-1)

    def through(self) -> Tensor:
        """Decay across each chunk, one factor per column of the state: c 1 (h p)."""
        return self.rise()[:, -1:].repeat_interleave(self.x.shape[-1], dim=-1).flatten(2)

    def decay(self) -> Tensor:
        """c h q q; 1 above the diagonal, so that nothing overflows."""
        cum = self.cum.transpose(1, 2).contiguous()
        return _exp_(cum.unsqueeze(-1) - cum.unsqueeze(-2))

    def overlap(self) -> Tensor:
        """``C B^T`` on and below the diagonal: c q q."""
        return torch.bmm(self.C, self.B.transpose(1, 2)).tril_()


def _heads_first(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _spread(t: Tensor, like: Tensor) -> Tensor:
    """c q (h p) to c q h p."""
    return t.unflatten(-1, like.shape[-2:])


def _enter(added: Tensor, through: Tensor, carry: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """States that enter each chunk, and the state after the last one: ``h' = through h + added``."""
    states = torch.empty_like(added)
    own, add, keep = (block.by_segment(t) for t in (states, added, through))
    own[:, 0] = carry
    for i in range(block.chunks - 1):
        torch.addcmul(add[:, i], own[:, i], keep[:, i], out=own[:, i + 1])
    return states, torch.addcmul(add[:, -1], own[:, -1], keep[:, -1])


def _leave(direct: Tensor, through: Tensor, carry: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The same recurrence backward: gradients of the states that leave each chunk, and of the first that enters."""
    grads = torch.empty_like(direct)
    own, add, keep = (block.by_segment(t) for t in (grads, direct, through))
    own[:, -1] = carry
    for i in range(block.chunks - 1, 0, -1):
        torch.addcmul(add[:, i], own[:, i], keep[:, i], out=own[:, i - 1])
    return grads, torch.addcmul(add[:, 0], own[:, 0], keep[:, 0])


def _forward(part: _Part, carry: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs c q h p, states that enter each chunk c n (h p), and the state after the block."""
    scaled = part.x * part.dt.unsqueeze(-1)
    weights = part.decay().mul_(part.overlap().unsqueeze(1))
    y = _heads_first(weights @ _heads_first(scaled))
    added = torch.bmm(part.B.transpose(1, 2), scaled.mul_(part.fall()).flatten(2))
    states, after = _enter(added, part.through(), carry, block)
    across = _spread(torch.bmm(part.C, states), part.x)
    return torch.addcmul(y, across, part.rise()).addcmul_(part.x, part.D.unsqueeze(-1)), states, after


class _Grads(NamedTuple):
    """Gradients of one group in one block, and of the state before it."""

    x: Tensor
    dt: Tensor
    log: Tensor  # of dt A
    B: Tensor
    C: Tensor
    D: Tensor
    carry: Tensor


def _backward(part: _Part, kept: tuple[Tensor, ...], grad: Tensor, grad_after: Tensor, block: Block) -> _Grads:
    """Gradients from those of the outputs (c q h p) and of the state after the block; ``kept``: see ``_forward``."""
    y, states, after = kept
    x, dt = part.x, part.dt.unsqueeze(-1)
    scaled = x * dt
    # Through the states.
    into = (grad * part.rise()).flatten(2)
    direct = torch.bmm(part.C.transpose(1, 2), into)
    leaving, grad_before = _leave(direct, part.through(), grad_after, block)
    grad_C = torch.bmm(into, states.transpose(1, 2))
    grad_B = torch.bmm((scaled * part.fall()).flatten(2), leaving.transpose(1, 2))
    grad_scaled = _spread(torch.bmm(part.B, leaving), x).mul_(part.fall())
    # Inside chunks.
    decay, overlap = part.decay(), part.overlap()
    grad_decayed = (_heads_first(grad) @ _heads_first(scaled).transpose(-1, -2)).mul_(decay)
    grad_overlap = grad_decayed.sum(1).tril_()
    weights = decay.mul_(overlap.unsqueeze(1))
    grad_scaled += _heads_first(weights.transpose(-1, -2) @ _heads_first(grad))
    grad_C.baddbmm_(grad_overlap, part.B)
    grad_B.baddbmm_(grad_overlap.transpose(1, 2), part.C)
    # Every term of y_i carries exp(cum_i), every use of x_j carries exp(-cum_j), every new state exp(cum_q).
    use, skip = (grad_scaled * x).sum(-1), (grad * x).sum(-1)
    grad_cum = (grad * y).sum(-1).addcmul_(skip, part.D, value=-1).addcmul_(use, part.dt, value=-1)
    grad_cum[:, -1] += _state_decay(leaving, states, after, block).unflatten(-1, x.shape[-2:]).sum(-1)
    grad_log = grad_cum.flip(1).cumsum(1).flip(1)
    grad_x = grad_scaled.mul_(dt).addcmul_(grad, part.D.unsqueeze(-1))
    return _Grads(grad_x, use, grad_log, grad_B, grad_C, skip.sum((0, 1)), grad_before)


def _state_decay(leaving: Tensor, states: Tensor, after: Tensor, block: Block) -> Tensor:
    """``<gradient of h', h'>`` of each chunk, per column of the state: c (h p)."""
    held, grads = block.by_segment(states), block.by_segment(leaving)
    inner = (grads[:, :-1] * held[:, 1:]).sum(2)
    return torch.cat([inner, (grads[:, -1] * after).sum(1, keepdim=True)], dim=1).flatten(0, 1)


class _Inputs(NamedTuple):
    """All inputs in the dtype of the states."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def heads(self) -> int:
        """Heads of one group."""
        return self.x.shape[1] // self.B.shape[1]

    def parts(self, block: Block) -> Iterator[tuple[int, slice, _Part]]:
        """(group, its heads, inputs) of each group in ``block``."""
        dt = block.cut(self.dt, self.wide)
        cum = (dt * self.A.to(self.wide)).cumsum(1)
        for g in range(self.B.shape[1]):
            own = slice(g * self.heads, (g + 1) * self.heads)
            x, B, C = (block.cut(t, self.wide) for t in (self.x[:, own], self.B[:, g], self.C[:, g]))
            yield g, own, _Part(x, dt[..., own], cum[..., own], B, C, self.D[own].to(self.wide))

    def state(self, segments: int, initial: Tensor | None) -> Tensor:
        """States of all segments, ``[groups, segments, state, heads * dim]``."""
        groups, size, dim = self.B.shape[1], self.B.shape[2], self.x.shape[2]
        if initial is None:
            return self.x.new_zeros(groups, segments, size, self.heads * dim, dtype=self.wide)
        inner = initial.to(self.wide).unflatten(1, (groups, -1)).permute(1, 0, 4, 2, 3)
        return inner.flatten(3).contiguous()

    def outer(self, state: Tensor) -> Tensor:
        """The way back: ``[segments, heads, dim, state]``."""
        return state.unflatten(3, (self.heads, -1)).permute(1, 0, 3, 4, 2).flatten(1, 2).contiguous()


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: list[Block], segments: int, initial: Tensor | None, *given: Tensor) -> Any:
        inputs = _Inputs(*given)
        state = inputs.state(segments, initial)
        y = torch.empty(inputs.x.shape, dtype=inputs.wide, device=state.device)
        kept: list[Tensor] = []
        for block in blocks:
            for g, heads, part in inputs.parts(block):
                own, states, after = _forward(part, state[g, block.segments], block)
                block.join(own, y[:, heads])
                state[g, block.segments] = after
                kept += states, after
        ctx.blocks, ctx.initial = blocks, None if initial is None else initial.dtype
        ctx.save_for_backward(*given, y, *kept)
        return y.to(inputs.x.dtype), inputs.outer(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> Any:
        *given, y = (saved := ctx.saved_tensors)[:7]  # read once: recomputation unpacks a tensor only once
        inputs, groups = _Inputs(*given), given[3].shape[1]
        state = inputs.state(len(grad_final), grad_final)
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D = grads
        sums = [torch.zeros_like(t, dtype=inputs.wide) for t in (grad_A, grad_D)]
        for i, block in reversed(list(enumerate(ctx.blocks))):
            for g, heads, part in inputs.parts(block):
                states, after = saved[7 + 2 * (i * groups + g) :][:2]
                own_y, own_grad = (block.cut(t[:, heads], inputs.wide) for t in (y, grad_y))
                got = _backward(part, (own_y, states, after), own_grad, state[g, block.segments], block)
                state[g, block.segments] = got.carry
                A = inputs.A[heads].to(inputs.wide)
                block.join(got.x, grad_x[:, heads])
                block.join(torch.addcmul(got.dt, got.log, A), grad_dt[:, heads])
                block.join(got.B, grad_B[:, g])
                block.join(got.C, grad_C[:, g])
                sums[0][heads] += (got.log * part.dt).sum((0, 1))
                sums[1][heads] += got.D
        grad_initial = None if ctx.initial is None else inputs.outer(state).to(ctx.initial)
        grad_A.copy_(sums[0]), grad_D.copy_(sums[1])
        return None, None, grad_initial, *grads


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
    """See ``weft.ops.scan.ssd``."""
    tokens = max(1, BLOCK_NUMBERS * B.shape[1] // (x.shape[1] * x.shape[2]))
    blocks = make_blocks(segments, chunk, tokens, x.device)
    y, final = _SSD.apply(blocks, len(segments.lengths), initial, x, dt, A, B, C, D)
    return (y, final) if return_final else y


def ssd_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """See ``weft.ops.scan.ssd_step``."""
    seqs, heads, dim, size = state.shape
    groups = B.shape[1]
    wide = x.to(state.dtype)
    scaled = (wide * dt.unsqueeze(-1)).view(seqs, groups, -1, 1)
    B, C = (t.to(state.dtype).unsqueeze(2) for t in (B, C))
    state.mul_((dt * A).exp_()[..., None, None])
    inner = state.view(seqs, groups, -1, size)
    inner.addcmul_(scaled, B)
    y = (inner @ C.transpose(-1, -2)).view(seqs, heads, dim)
    return y.addcmul_(wide, D.unsqueeze(-1)).to(x.dtype)
