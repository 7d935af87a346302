"""Attention over documents that lie on several ranks (context parallelism).

The residual lies in contiguous parts. Attention may take its queries elsewhere so that every rank has as much
to do (``weft.plan.runs.arranged``), and brings its outputs back. What is awaited was launched before the work
that hides it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.nn.slots import Attend
from weft.nn.state import KVState
from weft.ops.attention import attend, attend_runs, attend_runs_backward
from weft.ops.segments import Cut, Segments
from weft.parallel import moves
from weft.parallel.comm import Comm, Pending
from weft.plan.context import ATTEND_FORMS, AttendShape, attend_refusal, choose_attend
from weft.plan.runs import (
    Holding,
    Piece,
    Route,
    arranged,
    common,
    contiguous,
    count,
    joined,
    pieces,
    route,
    rows,
    seen,
    shared,
)

KEPT = 32  # packs whose routes are kept, of all ranks that are threads of this process


class ContextAttend(Attend):
    """Attention inside documents that ranks share; all ranks of ``comm`` call it together.

    Where no document has tokens on two ranks, which all of them know, nothing is exchanged.

    Args:
        comm: the ranks that share a run of tokens, in the order of their parts.
        form: ring, all_gather or all_to_all; auto is the one with the fewest bytes (``weft.plan.context``).
    """

    def __init__(self, comm: Comm, form: str) -> None:
        super().__init__()
        if form not in (*ATTEND_FORMS, "auto"):
            raise ValueError(f"{form!r} is no form of attention; use auto, {', '.join(ATTEND_FORMS)}")
        self.comm, self.form = comm, form

    def forward(
        self,
        q: Float[Tensor, "tokens heads head_dim"],
        k: Float[Tensor, "tokens kv_heads head_dim"],
        v: Float[Tensor, "tokens kv_heads head_dim"],
        segments: Segments,
        state: KVState | None = None,
        past: list[int] | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Queries, keys, values and outputs of the tokens here.

        Raises:
            ValueError: a cache with documents that ranks share, or more parts or fewer than ranks, or a form
                that the heads do not allow (faults of the caller).
        """
        cut = segments.cut
        if cut is not None and state is not None:
            raise ValueError("parts of a run that ranks share cannot be attended to over a cache")
        if cut is None or not cut.crosses:
            return super().forward(q, k, v, segments, state, past)
        if (len(cut.counts), cut.index) != (self.comm.size, self.comm.rank):
            raise ValueError(
                f"part {cut.index} of {len(cut.counts)} is on rank {self.comm.rank} of {self.comm.size}"
            )
        scale, form = q.shape[-1] ** -0.5, self.form
        if form == "auto":
            sizes = q.shape[1], k.shape[1], q.shape[2], q.element_size()
            # As if samples were not packed: the same for every pack, so that the host plans nothing anew.
            form = choose_attend(AttendShape(cut.whole.windows or cut.whole.lengths, cut.counts, *sizes)).form
        if form == "all_to_all":
            return _all_to_all(self.comm, q, k, v, cut, scale)
        plan = _plan(cut.whole.lengths, cut.counts, cut.index, form)
        one = _Ring if form == "ring" else _Gathered
        return one.apply(q, torch.cat([k, v], 1), plan, self.comm, scale)


def _all_to_all(comm: Comm, q: Tensor, k: Tensor, v: Tensor, cut: Cut, scale: float) -> Tensor:
    """All tokens of some heads. Keys that several ranks need go to each; their gradients are summed here."""
    refusal = attend_refusal("all_to_all", q.shape[1], k.shape[1], comm.size)
    if refusal:
        raise ValueError(refusal)
    size, tokens = comm.size, len(q)
    copies = max(1, size // k.shape[1])
    keys, values = (t.unsqueeze(2).expand(-1, -1, copies, -1).flatten(1, 2) for t in (k, v))
    parts = torch.cat([t.unflatten(1, (size, -1)) for t in (q, keys, values)], 2)
    here = moves.exchange(comm, parts.transpose(0, 1).flatten(0, 1), [tokens] * size, cut.counts)
    heads, kv_heads = q.shape[1] // size, keys.shape[1] // size
    own_q, own_k, own_v = here.split([heads, kv_heads, kv_heads], 1)
    y = attend(own_q, own_k, own_v, cut.whole, scale)
    back = moves.exchange(comm, y, cut.counts, [tokens] * size)
    return back.unflatten(0, (size, tokens)).transpose(0, 1).flatten(1, 2)


@lru_cache(maxsize=KEPT)
def _index(rows: Holding, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop) for run in rows]).to(device, non_blocking=True)


def _take(x: Tensor, rows: Holding) -> Tensor:
    """The rows, in this order."""
    if len(rows) <= 1:
        return x[rows[0].start : rows[0].stop] if rows else x[:0]
    return x.index_select(0, _index(rows, x.device))


def _put(x: Tensor, rows: Holding) -> Tensor:
    """The way back: every row is in ``rows`` once."""
    return x if len(rows) <= 1 else torch.empty_like(x).index_copy_(0, _index(rows, x.device), x)


def _add(to: Tensor, rows: Holding, x: Tensor) -> None:
    """Add ``x`` to some rows, each of which is in ``rows`` once."""
    if len(rows) <= 1:
        _take(to, rows).add_(x)
    else:
        to.index_copy_(0, _index(rows, to.device), _take(to, rows).add_(x))


@dataclass(frozen=True)
class _Round:
    """One exchange of keys and values, and what is computed with what arrives."""

    rows: tuple[Holding, ...]  # what goes to each rank
    receive: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def start(self, comm: Comm, kv: Tensor) -> Pending:
        """Keys and values on their way to where they are seen."""
        return comm.start_all_to_all_v(_take(kv, self._flat), self._send, self.receive)

    def start_home(self, comm: Comm, grad: Tensor) -> Pending:
        """The gradients of what arrived on their way home."""
        return comm.start_all_to_all_v(grad, self.receive, self._send)

    def add(self, grad_kv: Tensor, came: Tensor) -> None:
        """Sum what came home, in the order of ranks."""
        for own, part in zip(self.rows, came.split(self._send), strict=True):
            _add(grad_kv, own, part)

    @cached_property
    def _send(self) -> list[int]:
        return [count(own) for own in self.rows]

    @cached_property
    def _flat(self) -> Holding:
        return joined(chain(*self.rows))


@dataclass(frozen=True)
class _Plan:
    """What a rank does for a pack.

    Attributes:
        route: to the balanced order; None where the tokens lie balanced.
        rounds: of the ring: keys and values, in the balanced order, of one other rank each; the first is of
            those that are here, which go nowhere. Of the all-gather: those of all ranks at once, from where
            they lie.
    """

    route: Route | None
    rounds: tuple[_Round, ...]

    def there(self, comm: Comm, x: Tensor) -> Tensor:
        """Rows to the balanced order."""
        if self.route is None:
            return x
        (send, out), (receive, into) = self._ways
        return _put(comm.all_to_all_v(_take(x, out), send, receive), into)

    def back(self, comm: Comm, y: Tensor) -> Tensor:
        """Rows back from it: the inverse and the transpose of ``there``."""
        if self.route is None:
            return y
        (send, out), (receive, into) = self._ways
        return _put(comm.all_to_all_v(_take(y, into), receive, send), out)

    @cached_property
    def _ways(self) -> list[tuple[list[int], Holding]]:
        return [([count(part) for part in side], joined(chain(*side))) for side in self.route or ()]


@lru_cache(maxsize=KEPT)
def _plan(lengths: tuple[int, ...], counts: tuple[int, ...], rank: int, form: str) -> _Plan:
    here, there = contiguous(counts), arranged(lengths, counts)
    size, own = len(counts), there[rank]
    sees = [seen(lengths, holding) for holding in there]
    way = None if here == there else route(here, there, rank)

    def exchanged(holders: Sequence[Holding], to: Sequence[int], source: Sequence[int]) -> _Round:
        out: list[Holding] = [()] * size
        came: list[Holding] = [()] * size
        for other in to:
            out[other] = rows(holders[rank], sees[other])
        for other in source:
            came[other] = common(holders[other], sees[rank])
        return _Round(tuple(out), tuple(map(count, came)), pieces(lengths, own, joined(chain(*came))))

    if form != "ring":
        return _Plan(way, (exchanged(here, range(size), range(size)),))
    shifts = range(1, size) if shared(lengths, there) else ()
    ring = [exchanged(there, [(rank + i) % size], [(rank - i) % size]) for i in shifts]
    return _Plan(way, (_Round(((),) * size, (0,) * size, pieces(lengths, own, own)), *ring))


def _going_round(kv: Tensor, rounds: tuple[_Round, ...], comm: Comm) -> Iterator[tuple[_Round, Tensor]]:
    """Keys and values that are seen here, our own first; the next are always under way."""
    block = kv
    for now, then in zip(rounds, (*rounds[1:], None), strict=True):
        pending = then.start(comm, kv) if then else None
        yield now, block
        if pending:
            block = pending.wait()


class _Ring(torch.autograd.Function):
    """Queries stay; keys and values come from each other rank in turn, and in the backward pass once more.

    Gradients of keys and values go home from the rank that made them and are summed there, round after round.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, plan: _Plan, comm: Comm, scale: float) -> Tensor:
        heads, state = q.shape[1], None
        q, kv = plan.there(comm, torch.cat([q, kv], 1)).tensor_split([heads], 1)
        for now, block in _going_round(kv, plan.rounds, comm):
            k, v = block.chunk(2, 1)
            state = attend_runs(q, k, v, now.pieces, scale, state)
        assert state is not None  # noqa: S101 - the first round is of our own keys
        out, lse = state[0].to(q.dtype), state[1]
        ctx.plan, ctx.comm, ctx.scale = plan, comm, scale
        ctx.save_for_backward(q, kv, out, lse)
        return plan.back(comm, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        plan, comm = ctx.plan, ctx.comm
        grad = plan.there(comm, grad)
        grad_q, grad_kv = (t.new_zeros(t.shape, dtype=lse.dtype) for t in (q, kv))
        home: tuple[_Round, Pending] | None = None
        for now, block in _going_round(kv, plan.rounds, comm):
            k, v = block.chunk(2, 1)
            of_q, *of_kv = attend_runs_backward(grad, out, lse, q, k, v, now.pieces, ctx.scale)
            grad_q += of_q
            if home:
                home[0].add(grad_kv, home[1].wait())
            made = torch.cat(of_kv, 1)
            if now is plan.rounds[0]:
                grad_kv += made
            else:
                home = now, now.start_home(comm, made)
        if home:
            home[0].add(grad_kv, home[1].wait())
        grads = plan.back(comm, torch.cat([grad_q, grad_kv], 1).to(q.dtype))
        grad_q, grad_kv = grads.tensor_split([q.shape[1]], 1)
        return grad_q, grad_kv, None, None, None


class _Gathered(torch.autograd.Function):
    """All keys and values that are seen here at once; gathered again for the backward pass, not kept.

    They travel while queries do, and their gradients go home while those of queries do.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, plan: _Plan, comm: Comm, scale: float) -> Tensor:
        gather = plan.rounds[0]
        pending = gather.start(comm, kv)
        q = plan.there(comm, q)
        k, v = pending.wait().chunk(2, 1)
        out, lse = attend_runs(q, k, v, gather.pieces, scale)
        out = out.to(q.dtype)
        ctx.plan, ctx.comm, ctx.scale = plan, comm, scale
        ctx.save_for_backward(q, kv, out, lse)
        return plan.back(comm, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        plan, comm = ctx.plan, ctx.comm
        gather = plan.rounds[0]
        pending = gather.start(comm, kv)
        grad = plan.there(comm, grad)
        k, v = pending.wait().chunk(2, 1)
        of_q, *of_kv = attend_runs_backward(grad, out, lse, q, k, v, gather.pieces, ctx.scale)
        pending = gather.start_home(comm, torch.cat(of_kv, 1))
        grad_q = plan.back(comm, of_q.to(q.dtype))
        grad_kv = kv.new_zeros(kv.shape, dtype=lse.dtype)
        gather.add(grad_kv, pending.wait())
        return grad_q, grad_kv.to(kv.dtype), None, None, None
