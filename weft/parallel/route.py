"""Routes carried out: rows packed once for each peer, sent all together, and written where they belong.

A channel is one direction of traffic between ranks. Posting never waits, so that what is computed until the
rows are awaited runs under the transfer; ranks that neither send nor receive take no part.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.parallel.comm import Comm, Transfer
from weft.plan.holders import rows_of
from weft.plan.route import Route, Share, share, transpose
from weft.plan.runs import Holding, Run, count


class Arrival:
    """Rows under way to this rank and from it; they belong to it until ``wait``."""

    def __init__(self, out: Tensor, transfer: Transfer, packed: Mapping[int, Tensor], own: Share) -> None:
        self._out, self._transfer, self._packed, self._own = out, transfer, packed, own

    def wait(self) -> Tensor:
        """This rank's rows as a target, once what it sends may be reused too; a second call gives them again.

        Sums are in the order of the ranks from which the summands come.
        """
        self._transfer.wait()
        packed, self._packed = self._packed, {}
        for peer, rows in packed.items():
            _write(self._out, self._own.receives[peer], rows, add=not self._own.once)
        return self._out


class Channel:
    """Traffic of rows of one shape, in one direction, first in first out between any two ranks.

    Args:
        comm: ranks of all routes of this channel; for nothing else at the same time.
        width: shape of a row.
        dtype: of rows.
        device: of rows; on a CUDA device the ranks connect here, so all of them must make the channel.
    """

    def __init__(self, comm: Comm, width: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.comm, self.width, self.dtype, self.device = comm, tuple(width), dtype, device
        self.rank = comm.ranks[comm.rank]
        self._places = {rank: place for place, rank in enumerate(comm.ranks)}
        if device.type == "cuda" and comm.size > 1:
            with comm.metadata():
                comm.all_reduce(torch.zeros((), device=device))

    def post(
        self, route: Route, x: Shaped[Tensor, "..."] | None = None, into: Shaped[Tensor, "..."] | None = None
    ) -> Arrival:
        """Launch what this rank sends and receives on a route.

        Args:
            route: whose legs of this rank have all their ranks in ``comm``.
            x: [rows as a source, *width], not written to before ``wait``; None where there are none.
            into: [rows as a target, *width], filled and given back by ``wait``; contiguous. A new tensor by
                default.

        Raises:
            ValueError: a tensor of another shape or dtype.
        """
        own = share(route, self.rank)
        x = self._checked("sends", x, own.have)
        out = self._checked("fills", into, own.want)
        if not (own.whole and own.once):
            out.zero_()
        sends = {peer: _take(x, rows) for peer, rows in own.sends.items()}
        came, packed = dict[int, Tensor](), dict[int, Tensor]()
        for peer, rows in own.receives.items():
            if peer == self.rank:
                packed[peer] = sends[peer]
            elif own.once and len(rows) == 1:
                came[peer] = _take(out, rows)
            else:
                came[peer] = packed[peer] = out.new_empty(count(rows), *self.width)
        transfer = self.comm.start_transfer(self._abroad(sends), self._abroad(came))
        return Arrival(out, transfer, packed, own)

    def _checked(self, verb: str, rows: Tensor | None, length: int) -> Tensor:
        shape = (length, *self.width)
        if rows is None and (verb == "fills" or not length):
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        told = "nothing" if rows is None else f"{rows.dtype} of shape {list(rows.shape)}"
        if rows is None or rows.shape != shape or rows.dtype != self.dtype:
            raise ValueError(f"rank {self.rank} {verb} {self.dtype} of shape {list(shape)}, not {told}")
        if verb == "fills" and not rows.is_contiguous():
            raise ValueError(f"what rank {self.rank} fills must be contiguous")
        return rows.detach()

    def _abroad(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {self._places[peer]: rows for peer, rows in tensors.items() if peer != self.rank}


def channel(
    world: Comm, route: Route, width: Sequence[int], dtype: torch.dtype, device: torch.device, name: str
) -> Channel:
    """This rank's channel for a route that never changes: between the ranks that it connects with this one.

    Ranks that share several channels make them in the same order. Each has a name of its own, also the two
    directions of an edge.
    """
    party = route.party(world.ranks[world.rank])
    return Channel(world.group(party, name), width, dtype, device)


@lru_cache(maxsize=256)
def _index(rows: Holding, device: torch.device) -> Int64[Tensor, " rows"]:
    return torch.from_numpy(rows_of(rows)).to(device, non_blocking=True)


def _one(rows: Holding) -> slice:
    run = rows[0] if rows else Run(0, 0)
    return slice(run.start, run.stop)


def _take(x: Tensor, rows: Holding) -> Tensor:
    """The rows, in this order: a view where they lie together."""
    if len(rows) == 1 and rows[0] == (0, len(x)):
        return x
    return x[_one(rows)] if len(rows) <= 1 else x.index_select(0, _index(rows, x.device))


def _write(to: Tensor, rows: Holding, x: Tensor, add: bool) -> None:
    """Write, or add to, rows each of which is in ``rows`` once."""
    if len(rows) > 1:
        to.index_copy_(0, _index(rows, to.device), _take(to, rows).add_(x) if add else x)
    elif add:
        to[_one(rows)].add_(x)
    else:
        to[_one(rows)].copy_(x)


class _Moved(torch.autograd.Function):
    """A route and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, there: Channel, back: Channel) -> Tensor:
        ctx.route, ctx.back = transpose(route), back
        return there.post(route, x).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back.post(ctx.route, grad.contiguous()).wait(), None, None, None


def moved(x: Shaped[Tensor, "..."], route: Route, there: Channel, back: Channel) -> Shaped[Tensor, "..."]:
    """[rows as a source, *width] -> [rows as a target, *width]; gradients travel on the transposed route.

    Every rank of the route takes part in both directions: a rank without rows to send gives none of them, but
    so that they require gradients; one without rows to receive has its result in what it differentiates.
    """
    return _Moved.apply(x, route, there, back)
