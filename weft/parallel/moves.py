"""Moves: exact transforms between the ways activations are cut, each with its transpose.

A move gathers (sharded -> the same values on every rank) and scatters (partial sums -> sharded). Each is the
other's transpose, so four autograd pairs carry every layout: gather, scatter, total (sum to all) and swap.
Collectives want equal shapes; rows that cannot be shared evenly are padded on the way and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.late import gradient, outer, queued
from weft.parallel.comm import Comm, Pending

Map = Callable[[Tensor], Tensor]


@runtime_checkable
class Move(Protocol):
    """Gather and its transpose."""

    def gather(self, x: Tensor) -> Tensor:
        """This rank's part -> the whole."""
        ...

    def scatter(self, y: Tensor) -> Tensor:
        """This rank's summand of the whole -> its part of the sum."""
        ...

    def start_scatter(self, y: Tensor) -> Callable[[], Tensor]:
        """``scatter`` under way; call the result to have it."""
        ...


class Rows:
    """Rows (tokens) over ranks, ``counts[i]`` of them on rank i, in order."""

    def __init__(self, comm: Comm, counts: Sequence[int]) -> None:
        self.comm, self.counts, self.longest = comm, list(counts), max(counts)
        self.even = min(counts) == self.longest

    def gather(self, x: Float[Tensor, "own *width"]) -> Float[Tensor, "rows *width"]:
        """All rows."""
        parts = self.comm.all_gather(_padded(x, self.longest))
        if self.even:
            return parts.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def scatter(self, y: Float[Tensor, "rows *width"]) -> Float[Tensor, "own *width"]:
        """This rank's rows of the sum."""
        return self.start_scatter(y)()

    def start_scatter(self, y: Float[Tensor, "rows *width"]) -> Callable[[], Tensor]:
        """``scatter`` under way."""
        if self.even:
            parts = y.view(len(self.counts), self.longest, *y.shape[1:])
        else:
            parts = torch.stack([_padded(part, self.longest) for part in y.split(self.counts)])
        pending = self.comm.start_reduce_scatter(parts)
        return lambda: pending.wait()[: self.counts[self.comm.rank]]


class Features:
    """Columns over ranks: ``columns[i]`` of the whole, all of one length, are on rank i.

    Several ranks may have a column (shared heads, groups). Sums for it go to all of them and come back from
    all of them; with ``once`` only the first of them gives it and gets its sums.
    """

    def __init__(
        self, comm: Comm, columns: Sequence[Sequence[int]], device: torch.device, once: bool = False
    ) -> None:
        self.comm, self._ranks = comm, len(columns)
        flat = [column for part in columns for column in part]
        first = {column: i for i, column in reversed(list(enumerate(flat)))}
        width = len(flat) // self._ranks
        mine = range(comm.rank * width, (comm.rank + 1) * width)
        repeated = len(first) < len(flat)
        self._send = torch.tensor(flat, device=device)
        self._pick = torch.tensor([first[column] for column in range(len(first))], device=device)
        self._adds = repeated and not once
        own = torch.tensor([first[flat[i]] == i for i in mine], device=device)
        self._own = own if repeated and once else None

    def gather(self, x: Float[Tensor, "tokens own"]) -> Float[Tensor, "tokens whole"]:
        """All columns."""
        parts = self.comm.all_gather(x).transpose(0, 1).flatten(1)
        if self._adds:
            return parts.new_zeros(len(parts), len(self._pick)).index_add_(1, self._send, parts)
        return parts.index_select(1, self._pick)

    def scatter(self, y: Float[Tensor, "tokens whole"]) -> Float[Tensor, "tokens own"]:
        """This rank's columns of the sum."""
        return self.start_scatter(y)()

    def start_scatter(self, y: Float[Tensor, "tokens whole"]) -> Callable[[], Tensor]:
        """``scatter`` under way."""
        parts = y.index_select(1, self._send).unflatten(1, (self._ranks, -1)).transpose(0, 1)
        pending = self.comm.start_reduce_scatter(parts)
        own = self._own
        return pending.wait if own is None else lambda: pending.wait() * own


class Blocks:
    """Rows over the rows of a plane of ranks and columns over its columns: the residual stream."""

    def __init__(self, comm: Comm, counts: Sequence[int], columns: int) -> None:
        self.comm, self.counts, self.columns, self.longest = comm, list(counts), columns, max(counts)

    def gather(self, x: Float[Tensor, "own width"]) -> Float[Tensor, "rows whole"]:
        """All rows with all columns."""
        parts = self.comm.all_gather(_padded(x, self.longest)).unflatten(0, (-1, self.columns))
        rows = parts.transpose(1, 2).flatten(2)  # [rows of the plane, longest, whole]
        return torch.cat([part[:count] for part, count in zip(rows, self.counts, strict=True)])

    def scatter(self, y: Float[Tensor, "rows whole"]) -> Float[Tensor, "own width"]:
        """This rank's block of the sum."""
        return self.start_scatter(y)()

    def start_scatter(self, y: Float[Tensor, "rows whole"]) -> Callable[[], Tensor]:
        """``scatter`` under way."""
        rows = torch.stack([_padded(part, self.longest) for part in y.split(self.counts)])
        parts = rows.unflatten(2, (self.columns, -1)).transpose(1, 2).flatten(0, 1)
        pending = self.comm.start_reduce_scatter(parts)
        return lambda: pending.wait()[: self.counts[self.comm.rank // self.columns]]


class Swap:
    """Rows with a part of the columns <-> a part of the rows with all columns (all-to-all)."""

    def __init__(self, comm: Comm, counts: Sequence[int]) -> None:
        self.comm, self.counts, self.longest = comm, list(counts), max(counts)

    def gather(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "own whole"]:
        """All columns of this rank's rows."""
        parts = torch.stack([_padded(part, self.longest) for part in x.split(self.counts)])
        mine = self.comm.all_to_all(parts)
        return mine.transpose(0, 1).flatten(1)[: self.counts[self.comm.rank]]

    def scatter(self, y: Float[Tensor, "own whole"]) -> Float[Tensor, "rows width"]:
        """The way back, also the transpose."""
        parts = _padded(y, self.longest).unflatten(1, (self.comm.size, -1)).transpose(0, 1)
        back = self.comm.all_to_all(parts)
        return torch.cat([part[:count] for part, count in zip(back, self.counts, strict=True)])

    def start_scatter(self, y: Float[Tensor, "own whole"]) -> Callable[[], Tensor]:
        """``scatter``, done."""
        back = self.scatter(y)
        return lambda: back


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


class _Pair(torch.autograd.Function):
    """A linear map and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, back: Map) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def gather(move: Move, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The whole, on every rank of the move."""
    return _Pair.apply(x, move.gather, move.scatter)


def scatter(move: Move, y: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """This rank's part of the sum of all ranks' ``y``."""
    return _Pair.apply(y, move.scatter, move.gather)


def total(comm: Comm, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The sum over ranks, on every rank, each of which uses it in its own way: its own transpose."""

    def add(y: Tensor) -> Tensor:
        return comm.all_reduce(y.clone(memory_format=torch.contiguous_format))

    return _Pair.apply(x, add, add)


def exchange(comm: Comm, x: Shaped[Tensor, "..."], send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """``send[i]`` rows to each rank i (``Comm.all_to_all_v``); the transpose sends gradients back."""
    return start_exchange(comm, x, send, receive)()


class _Trip:
    """Rows under way between ranks, and later their gradients under way back."""

    def __init__(self, comm: Comm, send: Sequence[int], receive: Sequence[int]) -> None:
        self.comm, self.send, self.receive = comm, send, receive
        self.there: Pending | None = None
        self.back: Pending | None = None


class _Depart(torch.autograd.Function):
    """Launches the exchange; its gradient arrives here, launched by ``_Arrive``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.there = trip.comm.start_all_to_all_v(x, trip.send, trip.receive)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        pending, ctx.trip.back = ctx.trip.back, None
        return pending.wait() if pending else None, None


class _Arrive(torch.autograd.Function):
    """Awaits the exchange."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        pending, trip.there = trip.there, None
        assert pending is not None  # noqa: S101 - called once, after ``_Depart``
        return pending.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        trip.back = trip.comm.start_all_to_all_v(grad, trip.receive, trip.send)
        return grad.new_empty(0), None


def start_exchange(
    comm: Comm, x: Shaped[Tensor, "..."], send: Sequence[int], receive: Sequence[int]
) -> Callable[[], Tensor]:
    """``exchange`` under way; call the result, once, to have the rows.

    The gradients travel from where the rows are awaited to where they were sent, so that what is computed in
    between runs under both exchanges: autograd runs nodes in the reverse order of their creation.
    """
    trip = _Trip(comm, send, receive)
    ticket = _Depart.apply(x, trip)
    return lambda: _Arrive.apply(ticket, trip)


class _Product(torch.autograd.Function):
    """A projection between two moves.

    Backward: the scatter of the input's gradient is under way while the weight's gradient is computed
    (AxoNN's overlapped all-reduce, arXiv 2502.08145), or queued: both collectives come first, so that what
    is queued has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: Move | None, after: Move | None) -> Tensor:
        whole = before.gather(x) if before else x
        ctx.save_for_backward(whole, weight)
        ctx.weight, ctx.before, ctx.after = queued(weight), before, after
        y = whole @ weight.t()
        return after.scatter(y) if after else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        whole, weight = ctx.saved_tensors
        grad = ctx.after.gather(grad) if ctx.after else grad
        wait = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            wait = ctx.before.start_scatter(grad_x) if ctx.before else lambda: grad_x
        if ctx.needs_input_grad[1]:
            grad_weight = gradient(ctx.weight, outer, grad, whole)
        return wait() if wait else None, grad_weight, None, None


def product(
    x: Float[Tensor, "tokens cols"],
    weight: Float[Tensor, "rows own"],
    before: Move | None,
    after: Move | None,
) -> Float[Tensor, "some width"]:
    """``scatter(gather(x) weight^T)`` with each collective where a move is given."""
    return _Product.apply(x, weight, before, after)
