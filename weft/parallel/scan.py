"""The Mamba-2 scan, and the convolution before it, of documents that go on from rank to rank.

Two exact forms. ``states``: every rank scans its own tokens from zero, one all-gather tells it what came
before, and what that adds to its first document is added. Of a document that goes on here the first
``taps - 1`` tokens are left apart, as their convolution needs inputs of earlier ranks; they are so few that
each rank computes them for the ranks before it too. ``all_to_all``: every rank has some heads of all tokens
meanwhile.

What a rank sends in the first form, in the dtype of the states: the logarithm of the decay through its last
document (less the tokens left apart), the state after it, the last inputs of its convolution, and the inputs
of the tokens left apart with their time steps. ``Segments.cut`` says on the host what ranks have of which
document, so nothing else is exchanged; ranks may have any number of tokens, also none.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.nn.slots import Conv, Scan, split_channels
from weft.nn.state import MambaState
from weft.ops.conv import causal_conv
from weft.ops.scan import across, ssd
from weft.ops.segments import Cut, Segments
from weft.parallel import moves
from weft.parallel.comm import Comm
from weft.parallel.moves import Rows
from weft.plan.context import ScanShape, choose_scan


class ContextScan(Scan):
    """The scan where ranks share the tokens of a run.

    Where no document crosses from one rank to another it is the one-device scan, and nothing is exchanged.

    Args:
        chunk: tokens per chunk.
        comm: the ranks that share the run, in the order of its tokens.
        form: ``states`` or ``all_to_all``; ``auto`` is the one with fewer bytes (``weft.plan.context``).
    """

    def __init__(self, chunk: int, comm: Comm, form: str) -> None:
        super().__init__(chunk)
        self.comm, self.form = comm, form

    def forward(
        self,
        x: Float[Tensor, "tokens heads head_dim"],
        dt: Float[Tensor, "tokens heads"],
        A: Float[Tensor, " heads"],
        B: Float[Tensor, "tokens groups state"],
        C: Float[Tensor, "tokens groups state"],
        D: Float[Tensor, " heads"],
        segments: Segments,
        state: MambaState | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The scan alone.

        Raises:
            ValueError: the form is ``all_to_all`` and the ranks cannot share the heads or groups.
        """
        if segments.cut is None or not segments.cut.crosses:
            return super().forward(x, dt, A, B, C, D, segments, state)
        sizes = B.shape[1], B.shape[2]
        if self._form(segments.cut, x, dt, sizes, 1) == "all_to_all":
            xBC = torch.cat([t.flatten(1) for t in (x, B, C)], dim=1)
            swap = _Swap(self.comm, segments.cut, len(A), sizes)
            xBC, dt = swap.there(xBC, dt)
            x, B, C = split_channels(xBC, swap.heads, swap.sizes)
            return swap.back(super().forward(x, dt, swap.own(A), B, C, swap.own(D), segments.whole))
        parts, own = _parts(segments), _Run(x, dt, A, B, C, D)
        y, packet = own.scan_last(segments.lengths, self.chunk)
        logs, states = self._gather(packet, len(parts))
        if not parts:
            return _take_part(y, states)
        return torch.cat(own.add(y, parts[-1], _carry(logs[:-1], states[:-1])))

    def convolved(
        self,
        xBC: Float[Tensor, "tokens channels"],
        conv: Conv,
        dt: Float[Tensor, "tokens heads"],
        A: Float[Tensor, " heads"],
        D: Float[Tensor, " heads"],
        sizes: tuple[int, int],
        segments: Segments,
        state: MambaState | None = None,
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """The convolution and the scan.

        Raises:
            ValueError: the form is ``all_to_all`` and the ranks cannot share the heads or groups.
        """
        if segments.cut is None or not segments.cut.crosses:
            return super().convolved(xBC, conv, dt, A, D, sizes, segments, state)
        x = xBC[:, : xBC.shape[1] - 2 * sizes[0] * sizes[1]].unflatten(1, (len(A), -1))
        if self._form(segments.cut, x, dt, sizes, conv.weight.shape[1]) == "all_to_all":
            swap = _Swap(self.comm, segments.cut, len(A), sizes)
            xBC, dt = swap.there(xBC, dt)
            y = super().convolved(
                xBC, swap.own_conv(conv), dt, swap.own(A), swap.own(D), swap.sizes, segments.whole
            )
            return swap.back(y)
        mixer = _Mixer(conv, A, D, sizes)
        parts, tail = _parts(segments), conv.weight.shape[1] - 1
        apart = min(tail, parts[-1]) if parts else 0
        body = mixer.run(xBC, dt, segments).rows(slice(apart, None))
        lengths = (segments.lengths[0] - apart, *segments.lengths[1:]) if parts else segments.lengths
        y, packet = body.scan_last(lengths, self.chunk)
        last = min(tail, segments.lengths[-1]) if segments.lengths else 0
        edges = [_pad(xBC[len(xBC) - last :], tail - last, 0)]
        edges += [_pad(t[:apart], 0, tail - apart) for t in (xBC, dt)]
        logs, states, newest, first, steps = self._gather([*packet, *edges], len(parts))
        if not parts:
            return _take_part(y, states)
        # What each later rank of the document left apart; its padding has time step 0 and changes no state.
        each = Segments((tail,) * (len(parts) - 1))
        flat = first[1:].flatten(0, 1).to(xBC.dtype), steps[1:].flatten(0, 1).to(dt.dtype)
        run = mixer.run(*flat, each, _before(newest, parts)[1:])
        y_first, after = run.scan(each, self.chunk)
        # In the order of tokens: the others of one rank, then those left apart on the next.
        logs = torch.stack([logs[:-1], steps[1:].sum(1) * A.to(steps.dtype)], dim=1).flatten(0, 1)
        states = torch.stack([states[:-1], after], dim=1).flatten(0, 1)
        here = slice(each.starts[-1], each.starts[-1] + apart)
        pieces = run.rows(here).add(y_first[here], apart, _carry(logs[:-1], states[:-1]))
        pieces += body.add(y, parts[-1] - apart, _carry(logs, states))
        return torch.cat(pieces)

    def _form(self, cut: Cut, x: Tensor, dt: Tensor, sizes: tuple[int, int], taps: int) -> str:
        if self.form != "auto":
            return self.form
        heads, width = x.shape[1:]
        items = x.element_size(), dt.element_size()
        shape = ScanShape(cut.whole.lengths, cut.counts, heads, width, *sizes, taps, *items)
        return choose_scan(shape).form

    def _gather(self, pieces: Sequence[Tensor], parts: int) -> list[Tensor]:
        """The pieces of so many ranks up to this one, ``[parts, *shape]`` each, in one all-gather."""
        size, stop = self.comm.size, self.comm.rank + 1
        packet = torch.cat([piece.flatten().to(pieces[1].dtype) for piece in pieces])
        rows = moves.gather(Rows(self.comm, [1] * size), packet.unsqueeze(0))[stop - parts : stop]
        flat = rows.split([piece.numel() for piece in pieces], dim=1)
        return [got.view(parts, *piece.shape) for got, piece in zip(flat, pieces, strict=True)]


def _parts(segments: Segments) -> tuple[int, ...]:
    """Tokens of the document that goes on here, on the ranks from where it begins to this one."""
    cut = segments.cut
    if cut is None or not segments.continues:
        return ()
    start = max(start for start in cut.whole.starts if start < cut.start)
    return tuple(
        part.stop - max(start, part.start) for part in cut.ranges[: cut.index] if start < part.stop
    ) + (segments.lengths[0],)


def _take_part(y: Tensor, states: Tensor) -> Tensor:
    """``y`` and nothing of ``states`` [0, ...], so that the backward pass too joins in the exchange."""
    return torch.cat([y, states[..., 0].to(y.dtype)])


def _pad(rows: Tensor, before: int, after: int) -> Tensor:
    return F.pad(rows, (0, 0, before, after))


def _carry(logs: Tensor, states: Tensor) -> Tensor:
    """The state after runs of tokens from the states ``[runs, ...]`` after each alone, and their decays."""
    later = F.pad(logs[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))  # decay through all runs after each
    return torch.einsum("rh,rhpn->hpn", later.exp(), states)


def _before(newest: Tensor, parts: Sequence[int]) -> Tensor:
    """The inputs before each part of a document, ``[parts, channels, tail]``; zeros before it begins.

    Args:
        newest: ``[parts, tail, channels]``, the last inputs of each part, zeros before the first of them.
        parts: tokens of each; a short one does not hold all that the next one needs.
    """
    tail = newest.shape[1]
    held = [min(tail, part) for part in parts]
    own = [rows[tail - count :] for rows, count in zip(newest, held, strict=True)]
    line = torch.cat([torch.zeros_like(newest[0]), *own])
    starts = list(accumulate(held, initial=0))[:-1]
    return torch.stack([line[start : start + tail] for start in starts]).transpose(1, 2)


class _Run(NamedTuple):
    """The inputs of ``ssd``."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def rows(self, tokens: slice) -> "_Run":
        """The same of some of the tokens."""
        return self._replace(x=self.x[tokens], dt=self.dt[tokens], B=self.B[tokens], C=self.C[tokens])

    def scan(self, segments: Segments, chunk: int) -> tuple[Tensor, Tensor]:
        """Outputs and final states, from zero."""
        return cast(tuple[Tensor, Tensor], ssd(*self, segments, chunk, return_final=True))

    def scan_last(self, lengths: tuple[int, ...], chunk: int) -> tuple[Tensor, list[Tensor]]:
        """Outputs, from zero; and of the last segment the decay (as logarithm) and the final state."""
        segments = Segments(lengths or (0,))
        y, final = self.scan(segments, chunk)
        last = self.dt[segments.starts[-1] :].to(final.dtype)
        return y, [last.sum(0) * self.A.to(final.dtype), final[-1]]

    def add(self, y: Tensor, tokens: int, state: Tensor) -> list[Tensor]:
        """``y`` with what ``state`` gives to the first ``tokens``: these, and the others."""
        given = across(self.dt[:tokens], self.A, self.C[:tokens], state)
        return [(y[:tokens] + given).to(y.dtype), y[tokens:]]


class _Mixer(NamedTuple):
    """The parameters of a convolution and a scan."""

    conv: Conv
    A: Tensor
    D: Tensor
    sizes: tuple[int, int]

    def run(self, xBC: Tensor, dt: Tensor, segments: Segments, before: Tensor | None = None) -> _Run:
        """What the scan reads, after the convolution."""
        mixed = cast(Tensor, causal_conv(xBC, *self.conv, segments, initial=before))
        x, B, C = split_channels(mixed, len(self.A), self.sizes)
        return _Run(x, dt, self.A, B, C, self.D)


class _Swap:
    """Some tokens of all heads <-> all tokens of some heads, with the groups that these read.

    Args:
        comm: the ranks that share the tokens.
        cut: which of the tokens are here.
        heads: in all.
        sizes: groups in all, and their state.

    Raises:
        ValueError: the heads of a rank would be neither whole groups nor inside one group.
    """

    def __init__(self, comm: Comm, cut: Cut, heads: int, sizes: tuple[int, int]) -> None:
        groups, ranks = sizes[0], comm.size
        if heads % ranks or (groups % ranks and ranks % groups):
            raise ValueError(
                f"{heads} heads in {groups} groups cannot be shared by cp={ranks}: heads must be a multiple "
                f"of cp, and groups a multiple or a divisor of it; use the form states"
            )
        self.comm, self.counts = comm, cut.counts
        self.all_heads, self.all_sizes = heads, sizes
        self.heads, self.sizes = heads // ranks, (max(1, groups // ranks), sizes[1])

    def there(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of this rank's channels and heads; one exchange where dtypes are the same."""
        pieces = [self._channels(xBC), self._cut(dt)]
        if xBC.dtype == dt.dtype:
            widths = [piece.shape[2] for piece in pieces]
            own, steps = self._send(torch.cat(pieces, dim=2))().split(widths, dim=1)
            return own, steps
        waits = [self._send(piece) for piece in pieces]
        return waits[0](), waits[1]()

    def back(self, y: Tensor) -> Tensor:
        """All heads of this rank's tokens."""
        ranks, mine = self.comm.size, self.counts[self.comm.rank]
        rows = moves.exchange(self.comm, y, self.counts, [mine] * ranks)
        return rows.unflatten(0, (ranks, mine)).transpose(0, 1).flatten(1, 2)

    def own(self, t: Tensor) -> Tensor:
        """This rank's heads of a parameter."""
        return t.unflatten(0, (self.comm.size, -1))[self.comm.rank]

    def own_conv(self, conv: Conv) -> Conv:
        """This rank's channels of the convolution."""
        weight, bias = (self._channels(t)[self.comm.rank] for t in (conv.weight.t(), conv.bias.unsqueeze(0)))
        return Conv(weight.t(), bias.squeeze(0))

    def _send(self, pieces: Tensor) -> Callable[[], Tensor]:
        ranks, mine = self.comm.size, self.counts[self.comm.rank]
        return moves.start_exchange(self.comm, pieces.flatten(0, 1), [mine] * ranks, self.counts)

    def _cut(self, t: Tensor) -> Tensor:
        """``[rows, columns]`` as ``[ranks, rows, own columns]``."""
        return t.unflatten(1, (self.comm.size, -1)).transpose(0, 1)

    def _channels(self, xBC: Tensor) -> Tensor:
        """The channels ``[x | B | C]`` that each rank reads; groups fewer than ranks go to several."""
        copies = max(1, self.comm.size // self.all_sizes[0])
        x, *shared = split_channels(xBC, self.all_heads, self.all_sizes)
        shared = [t.unsqueeze(2).expand(-1, -1, copies, -1) for t in shared]
        return torch.cat([self._cut(t.flatten(1)) for t in (x, *shared)], dim=2)
