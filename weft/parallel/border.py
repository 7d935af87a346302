"""The border between an encoder and the decoder: rows of items on their way to the tokens that they fill."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from weft.parallel.comm import Comm
from weft.parallel.route import Channel
from weft.plan.plans import Plans
from weft.plan.route import Route, transpose


class Border:
    """Channels of one rank, one for each direction; a collective call of all ranks of both sides.

    Where the decoder cuts features, a row travels as that many parts: the first parts of all rows, then the
    second ones.

    Args:
        plans: of all modules.
        name: the encoder.
        width: numbers of a row.
        comm: all ranks of the run.
        dtype: of rows.
        device: of rows.

    Attributes:
        sends: whether rows of the encoder are made here.
        receives: whether tokens are here that they fill.
    """

    def __init__(
        self, plans: Plans, name: str, width: int, comm: Comm, dtype: torch.dtype, device: torch.device
    ) -> None:
        layout, reader = plans.all[name].dense, plans.decoder.at(0).dense
        last = layout.grid.size("pp") - 1
        senders = layout.holders((last,), tuple(range(layout.places)))
        readers = reader.holders((0,), tuple(range(reader.places)))
        rank = comm.ranks[comm.rank]
        self.sends, self.receives = rank in senders, rank in readers
        self._parts = reader.plane.tp_embed
        if self.sends or self.receives:
            ranks = tuple(dict.fromkeys((*senders, *readers)))
            columns = (width // self._parts,)
            self._there = Channel(comm.group(ranks, f"{name}>"), columns, dtype, device)
            self._back = Channel(comm.group(ranks, f"{name}<"), columns, dtype, device)

    def forward(
        self, route: Route, rows: Float[Tensor, "made width"] | None
    ) -> Callable[[], Float[Tensor, "filled part"] | None]:
        """Launch the rows made here; what is returned waits, and gives those of the tokens here."""
        arrival = self._there.post(route, None if rows is None else self._apart(rows))
        return lambda: self._came(arrival.wait(), self.receives)

    def backward(
        self, route: Route, gradient: Float[Tensor, "filled part"] | None
    ) -> Callable[[], Float[Tensor, "made width"] | None]:
        """The way back of gradients, on the transposed route."""
        arrival = self._back.post(transpose(route), gradient)

        def wait() -> Tensor | None:
            came = self._came(arrival.wait(), self.sends)
            return came if came is None else self._joint(came)

        return wait

    @staticmethod
    def _came(rows: Tensor, wanted: bool) -> Tensor | None:
        return rows if wanted else None

    def _apart(self, rows: Tensor) -> Tensor:
        if self._parts == 1:
            return rows.contiguous()
        parts = rows.unflatten(-1, (self._parts, -1)).transpose(0, 1)
        return parts.reshape(-1, parts.shape[-1])

    def _joint(self, parts: Tensor) -> Tensor:
        if self._parts == 1:
            return parts
        return parts.view(self._parts, -1, parts.shape[-1]).transpose(0, 1).flatten(-2)
