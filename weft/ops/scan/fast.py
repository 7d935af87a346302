"""The chunked scan as matrix products, with a hand-written gradient.

In one chunk of ``q`` tokens, with ``cum`` the running sum of ``dt A`` inside it:

    decay[i, j] = exp(cum_i - cum_j) for j <= i,  rise_i = exp(cum_i),  fall_j = exp(cum_q - cum_j)
    y_i = sum_{j <= i} (C_i . B_j) decay[i, j] dt_j x_j + rise_i C_i . h + D x_i
    h'  = rise_q h + sum_j fall_j dt_j x_j B_j^T

Work goes over blocks of chunks small enough for the cache. States are ``[.., state, heads * dim]`` of one
group: one product serves all its heads, so B and C are never repeated. Inputs, ``C B^T``, the states
between chunks and what they give are kept; decays are made again in the backward pass.
"""

from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.blocks import block_rows
from weft.ops.scan.chunks import Block, make_blocks
from weft.ops.segments import Segments

BLOCK_NUMBERS = 2**18  # of x in one block: a few such arrays fit the caches


def _exp_(t: Tensor) -> Tensor:
    """``exp`` in place of numbers <= 0; others count as 0.

    What would underflow counts as about the least normal number: MKL takes ten times as long to underflow.
    """
    return t.clamp_(log(torch.finfo(t.dtype).tiny) + 1, 0).exp_()


class _Part(NamedTuple):
    """One block. Dimensions: (chunk, group) c, tokens q, heads of a group h, head_dim p, state n."""

    x: Tensor  # c q h p
    dt: Tensor  # c q h
    cum: Tensor  # c q h
    B: Tensor  # c q n
    C: Tensor  # c q n
    D: Tensor  # c 1 h

    def rise(self) -> Tensor:
        return _exp_(self.cum.clone()).unsqueeze(-1)

    def fall(self) -> Tensor:
        return _exp_(self.cum[:, -1:] - self.cum).unsqueeze(-1)

    def through(self) -> Tensor:
        """Decay across each chunk, one factor per column of the state: c 1 (h p)."""
        return _exp_(self.cum[:, -1:].clone()).repeat_interleave(self.x.shape[-1], dim=-1)

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
    own, add, keep = (block.by_chunk(t, carry.shape[1]) for t in (states, added, through))
    own[:, 0] = carry
    for i in range(block.chunks - 1):
        torch.addcmul(add[:, i], own[:, i], keep[:, i], out=own[:, i + 1])
    return states, torch.addcmul(add[:, -1], own[:, -1], keep[:, -1])


def _leave(direct: Tensor, through: Tensor, carry: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The same backward: gradients of the states that leave each chunk, and of the first that enters."""
    grads = torch.empty_like(direct)
    own, add, keep = (block.by_chunk(t, carry.shape[1]) for t in (grads, direct, through))
    own[:, -1] = carry
    for i in range(block.chunks - 1, 0, -1):
        torch.addcmul(add[:, i], own[:, i], keep[:, i], out=own[:, i - 1])
    return grads, torch.addcmul(add[:, 0], own[:, 0], keep[:, 0])


class _Kept(NamedTuple):
    """What the backward pass reads of a block."""

    overlap: Tensor  # c q q
    states: Tensor  # c n (h p), those that enter each chunk
    across: Tensor  # c q (h p), outputs of these states, before their rise


def _forward(part: _Part, carry: Tensor, block: Block) -> tuple[Tensor, Tensor, _Kept]:
    """Outputs c q h p, and the state after the block."""
    scaled, overlap = part.x * part.dt.unsqueeze(-1), part.overlap()
    weights = part.decay().mul_(overlap.unsqueeze(1))
    y = _heads_first(weights @ _heads_first(scaled))
    added = torch.bmm(part.B.transpose(1, 2), scaled.mul_(part.fall()).flatten(2))
    states, after = _enter(added, part.through(), carry, block)
    across = torch.bmm(part.C, states)
    y = torch.addcmul(y, _spread(across, part.x), part.rise()).addcmul_(part.x, part.D.unsqueeze(-1))
    return y, after, _Kept(overlap, states, across)


class _Grads(NamedTuple):
    """Gradients of one block, and of the state before it."""

    x: Tensor  # c q h p
    dt: Tensor  # c q h, without the part through dt A
    log: Tensor  # c q h, of dt A
    B: Tensor  # c q n
    C: Tensor  # c q n
    D: Tensor  # c q h, not summed
    carry: Tensor


def _backward(part: _Part, kept: _Kept, grad: Tensor, carry: Tensor, block: Block) -> _Grads:
    """Gradients from those of the outputs (``grad`` c q h p) and of the state after the block (``carry``).

    The gradient of ``dt A`` adds, for each token, only the terms whose decay spans it. (The shorter form,
    differences of ``grad . y`` and ``use . dt``, cancels: gradients of a whole model's ``A_log`` were off by
    up to 2.5e-3 in fp32.)
    """
    x, dt, fall = part.x, part.dt.unsqueeze(-1), part.fall()
    scaled = x * dt
    # Inside chunks.
    decay = part.decay()
    grad_decayed = (_heads_first(grad) @ _heads_first(scaled).transpose(-1, -2)).mul_(decay)
    spans = grad_decayed * kept.overlap.unsqueeze(1)  # gradient of cum_i - cum_j
    spans.diagonal(dim1=-2, dim2=-1).zero_()  # where i = j no decay is spanned
    log = _heads_first(spans.sum(-1) - spans.sum(-2))
    grad_overlap = (
        grad_decayed.sum(1).tril_() if grad_decayed.shape[1] > 1 else grad_decayed.squeeze(1).tril_()
    )
    weights = decay.mul_(kept.overlap.unsqueeze(1))
    grad_scaled = _heads_first(weights.transpose(-1, -2) @ _heads_first(grad))
    # Through the states.
    into, through = (grad * part.rise()).flatten(2), part.through()
    leaving, before = _leave(torch.bmm(part.C.transpose(1, 2), into), through, carry, block)
    log += _spread(kept.across * into, x).sum(-1)
    grad_C = torch.bmm(into, kept.states.transpose(1, 2)).baddbmm_(grad_overlap, part.B)
    grad_B = torch.bmm(scaled.mul_(fall).flatten(2), leaving.transpose(1, 2))
    grad_B.baddbmm_(grad_overlap.transpose(1, 2), part.C)
    onward = _spread(torch.bmm(part.B, leaving), x)
    late = (onward * scaled).sum(-1)  # spans the tokens after this one to the chunk's end
    held = (kept.states * leaving).sum(1, keepdim=True).mul_(through)  # spans the whole chunk
    grad_scaled = torch.addcmul(grad_scaled, onward, fall)
    grad_log = log.flip(1).cumsum(1).flip(1).add_(late.cumsum(1).sub_(late)).add_(_spread(held, x).sum(-1))
    use, skip = (grad_scaled * x).sum(-1), (grad * x).sum(-1)
    grad_x = grad_scaled.mul_(dt).addcmul_(grad, part.D.unsqueeze(-1))
    return _Grads(grad_x, use, grad_log, grad_B, grad_C, skip, before)


class _Inputs(NamedTuple):
    """The inputs as given."""

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
    def groups(self) -> int:
        return self.B.shape[1]

    def part(self, block: Block) -> _Part:
        """The inputs of ``block`` in the dtype of the states."""
        x, dt, B, C = (self.cut(t[block.tokens], block) for t in (self.x, self.dt, self.B, self.C))
        A, D = (t.to(self.wide).view(1, self.groups, 1, -1) for t in (self.A, self.D))
        cum = (dt.unflatten(0, (-1, self.groups)) * A).flatten(0, 1).cumsum(1)
        D = D.expand(len(x) // self.groups, -1, -1, -1).flatten(0, 1)
        return _Part(x, dt, cum, B.squeeze(2), C.squeeze(2), D)

    def cut(self, t: Tensor, block: Block) -> Tensor:
        """The block's ``[tokens, heads, ..]`` (or groups) to ``[(chunk, group), q, own heads, ..]``."""
        return block.cut(t, self.wide).unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def join(self, t: Tensor, block: Block, out: Tensor) -> None:
        """The way back, into the block's tokens of ``out``."""
        block.join(t.unflatten(0, (-1, self.groups)).transpose(1, 2), out)

    def state(self, segments: int, initial: Tensor | None) -> Tensor:
        """States of all segments, ``[segments, groups, state, heads * dim]``."""
        if initial is None:
            heads, size = self.x.shape[1] // self.groups, self.B.shape[2]
            return self.x.new_zeros(segments, self.groups, size, heads * self.x.shape[2], dtype=self.wide)
        inner = initial.to(self.wide).unflatten(1, (self.groups, -1)).permute(0, 1, 4, 2, 3)
        return inner.flatten(3).contiguous()

    def outer(self, state: Tensor) -> Tensor:
        """The way back: ``[segments, heads, dim, state]``."""
        return state.unflatten(3, (-1, self.x.shape[2])).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: list[Block], segments: int, initial: Tensor | None, *given: Tensor) -> Any:
        inputs = _Inputs(*given)
        state = inputs.state(segments, initial)
        y = torch.empty(inputs.x.shape, dtype=inputs.wide, device=state.device)
        kept: list[Tensor] = []
        for block in blocks:
            own, state[block.segments], keep = _forward(inputs.part(block), state[block.segments], block)
            inputs.join(own, block, y)
            kept += keep
        ctx.blocks, ctx.initial = blocks, None if initial is None else initial.dtype
        ctx.save_for_backward(*given, *kept)
        return y.to(inputs.x.dtype), inputs.outer(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> Any:
        saved = ctx.saved_tensors  # read once: recomputation unpacks a tensor only once
        inputs = _Inputs(*saved[:6])
        state = inputs.state(len(grad_final), grad_final)
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        A, D = (torch.zeros_like(t, dtype=inputs.wide) for t in (inputs.A, inputs.D))
        for at, block in reversed(list(enumerate(ctx.blocks))):
            part, kept = inputs.part(block), _Kept(*saved[6 + 3 * at : 9 + 3 * at])
            own = inputs.cut(grad_y[block.tokens], block)
            got = _backward(part, kept, own, state[block.segments], block)
            state[block.segments] = got.carry
            A += (got.log * part.dt).unflatten(0, (-1, inputs.groups)).sum((0, 2)).flatten()
            D += got.D.unflatten(0, (-1, inputs.groups)).sum((0, 2)).flatten()
            dt = got.log.unflatten(0, (-1, inputs.groups)) * inputs.A.to(inputs.wide).view(
                inputs.groups, 1, -1
            )
            own_grads = got.x, got.dt + dt.flatten(0, 1), got.B.unsqueeze(2), got.C.unsqueeze(2)
            for t, out in zip(own_grads, (grads[i] for i in (0, 1, 3, 4)), strict=True):
                inputs.join(t, block, out)
        grads[2].copy_(A)
        grads[5].copy_(D)
        return None, None, None if ctx.initial is None else inputs.outer(state).to(ctx.initial), *grads


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
    tokens = block_rows(x.device, x.shape[1] * x.shape[2], BLOCK_NUMBERS)
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
