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

Documents may go on from a state that every rank has, and then every rank gets the states after them. Where
the last token of a document is also the last of a rank, its state follows from what was gathered; those of
other documents come, in one exchange more, from where they end.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from weft.nn.slots import Conv, Scan, convolve, split_channels
from weft.nn.state import MambaState
from weft.ops.segments import Cut, Segments
from weft.parallel import moves
from weft.parallel.comm import Comm
from weft.parallel.moves import Rows
from weft.parallel.scan_runs import Left, Mixer, carry
from weft.parallel.scan_state import Documents, documents, newest, share
from weft.plan.context import SCAN_FORMS, ScanShape, choose_scan, scan_refusal


class ContextScan(Scan):
    """The scan where ranks share the tokens of a run.

    Where no document crosses from one rank to another it is the one-device scan, and nothing is exchanged but
    states that are given and written. These are of the documents of ``segments.whole``, in order, the same on
    all ranks before and after; no gradient goes through them.

    Args:
        chunk: tokens per chunk.
        comm: the ranks that share the run, in the order of its tokens.
        form: ``states`` or ``all_to_all``; ``auto`` is the one with fewer bytes (``weft.plan.context``).
    """

    def __init__(self, chunk: int, comm: Comm, form: str) -> None:
        super().__init__(chunk)
        if form not in (*SCAN_FORMS, "auto"):
            raise ValueError(f"{form!r} is no form of a scan; use auto, {', '.join(SCAN_FORMS)}")
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
            ValueError: the form is ``all_to_all`` and the ranks cannot share the heads or groups, or
                ``state`` is not of as many documents as there are.
        """
        if _alone(segments, state):
            return super().forward(x, dt, A, B, C, D, segments, state)
        xBC = torch.cat([t.flatten(1) for t in (x, B, C)], dim=1)
        if state is not None:
            state = MambaState(xBC.new_empty(len(state.ssm), xBC.shape[1], 0), state.ssm)
        return self._shared(Mixer(None, A, D, (B.shape[1], B.shape[2])), xBC, dt, segments, state)

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
            ValueError: as ``forward``.
        """
        if _alone(segments, state):
            return super().convolved(xBC, conv, dt, A, D, sizes, segments, state)
        return self._shared(Mixer(conv, A, D, sizes), xBC, dt, segments, state)

    def _shared(
        self, mixer: Mixer, xBC: Tensor, dt: Tensor, segments: Segments, state: MambaState | None
    ) -> Tensor:
        cut = segments.cut
        assert cut is not None  # noqa: S101 - see ``_alone``
        if state is not None and len(state.ssm) != len(cut.whole.lengths):
            raise ValueError(
                f"a state of {len(state.ssm)} documents is given to a run of {len(cut.whole.lengths)}; "
                "give one of as many"
            )
        if not cut.crosses:
            return self._own(mixer, xBC, dt, documents(cut), state)
        if self._form(cut, mixer, xBC, dt) == "states":
            return self._states(mixer, xBC, dt, documents(cut), state)
        swap = _Swap(self.comm, cut, len(mixer.A), mixer.sizes)
        own = swap.state(state) if state is not None else None
        y = self._one(swap.mixer(mixer), *swap.there(xBC, dt), cut.whole, own)
        if state is not None and own is not None:
            swap.keep(own, state)
        return swap.back(y)

    def _one(
        self, mixer: Mixer, xBC: Tensor, dt: Tensor, segments: Segments, state: MambaState | None
    ) -> Tensor:
        """As one rank does."""
        mixed = xBC if mixer.conv is None else convolve(xBC, mixer.conv, segments, state)
        x, B, C = split_channels(mixed, len(mixer.A), mixer.sizes)
        return super().forward(x, dt, mixer.A, B, C, mixer.D, segments, state)

    def _own(
        self, mixer: Mixer, xBC: Tensor, dt: Tensor, docs: Documents, state: MambaState | None
    ) -> Tensor:
        """Documents that are on one rank each."""
        own = None
        if state is not None and docs.lengths:
            own = MambaState(state.conv[docs.here], state.ssm[docs.here])
        y = self._one(mixer, xBC, dt, Segments(docs.lengths), own)
        if state is not None:
            share(self.comm, docs.ending, [state.conv, state.ssm])
        return y

    def _states(
        self, mixer: Mixer, xBC: Tensor, dt: Tensor, docs: Documents, state: MambaState | None
    ) -> Tensor:
        parts, lengths, tail = docs.continued, docs.lengths or (0,), mixer.tail
        apart = min(tail, parts[-1]) if parts else 0
        given = _given(state, docs, xBC.dtype) if state is not None else None
        body = mixer.run(xBC, dt, Segments(lengths), given and given.conv).rows(slice(apart, None))
        own = Segments((lengths[0] - apart, *lengths[1:]))
        y, final = body.scan(own, self.chunk, given and given.ssm)
        last = min(tail, lengths[-1])
        edges = [_pad(xBC[len(xBC) - last :], tail - last, 0)]
        edges += [_pad(t[:apart], 0, tail - apart) for t in (xBC, dt)]
        left = self._gather([body.decay(slice(own.starts[-1], None)), final[-1], *edges])
        if parts:
            before = None if state is None else state.conv[docs.here.start]
            chain = mixer.chain(left.of(self.comm.rank, len(parts)), parts, before, self.chunk)
            here = slice(len(chain.y) - tail, len(chain.y) - tail + apart)
            start = carry(chain.logs[:-2], chain.states[:-2])
            pieces = chain.run.rows(here).add(chain.y[here], apart, start)
            start = carry(chain.logs[:-1], chain.states[:-1])
            y = torch.cat(pieces + body.add(y, own.lengths[0], start))
            if given is not None:
                given = MambaState(torch.cat([chain.inputs[-2:-1], given.conv[1:]]), given.ssm)
                decay = body.decay(slice(own.lengths[0])).exp()
                final = torch.cat([final[:1] + decay[:, None, None] * start, final[1:]])
        else:
            y = _take_part(y, left.states[:0])
        if state is not None and given is not None:
            ends = MambaState(newest(xBC, lengths, given.conv), final)
            self._keep(mixer, docs, left, ends, state)
        return y

    @torch.no_grad()
    def _keep(self, mixer: Mixer, docs: Documents, left: Left, ends: MambaState, state: MambaState) -> None:
        """Write the states after all documents; ``ends`` are those after the documents here."""
        for doc, rank in docs.closing:
            parts = docs.parts(doc, rank)
            chain = mixer.chain(left.of(rank, len(parts)), parts, state.conv[doc], self.chunk)
            state.conv[doc], state.ssm[doc] = chain.inputs[-1], carry(chain.logs, chain.states)
        inside = docs.inside[self.comm.rank]
        own = slice(inside.start - docs.here.start, inside.stop - docs.here.start)
        state.conv[inside], state.ssm[inside] = ends.conv[own], ends.ssm[own]
        share(self.comm, docs.inside, [state.conv, state.ssm])

    def _form(self, cut: Cut, mixer: Mixer, xBC: Tensor, dt: Tensor) -> str:
        if self.form != "auto":
            return self.form
        heads, (groups, size) = len(mixer.A), mixer.sizes
        width = (xBC.shape[1] - 2 * groups * size) // heads
        items = xBC.element_size(), dt.element_size()
        shape = ScanShape(cut.whole.lengths, cut.counts, heads, width, groups, size, mixer.tail + 1, *items)
        return choose_scan(shape).form

    def _gather(self, pieces: Sequence[Tensor]) -> Left:
        """The pieces of every rank, in one all-gather."""
        size = self.comm.size
        packet = torch.cat([piece.flatten().to(pieces[1].dtype) for piece in pieces])
        rows = moves.gather(Rows(self.comm, [1] * size), packet.unsqueeze(0))
        flat = rows.split([piece.numel() for piece in pieces], dim=1)
        return Left(
            *(got.view(size, *piece.shape).to(piece.dtype) for got, piece in zip(flat, pieces, strict=True))
        )


def _alone(segments: Segments, state: MambaState | None) -> bool:
    return segments.cut is None or (state is None and not segments.cut.crosses)


def _given(state: MambaState, docs: Documents, dtype: torch.dtype) -> MambaState:
    """States before the documents here, zero of one that began on an earlier rank."""
    here = docs.here if docs.lengths else slice(0, 1)
    ssm = state.ssm[here].clone()
    if docs.continued or not docs.lengths:
        ssm[0] = 0
    return MambaState(state.conv[here].to(dtype), ssm)


def _take_part(y: Tensor, states: Tensor) -> Tensor:
    """``y`` and nothing of ``states`` [0, ...], so that the backward pass too joins in the exchange."""
    return torch.cat([y, states[..., 0].to(y.dtype)])


def _pad(rows: Tensor, before: int, after: int) -> Tensor:
    return F.pad(rows, (0, 0, before, after))


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
        refusal = scan_refusal("all_to_all", heads, groups, ranks)
        if refusal:
            raise ValueError(refusal)
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

    def mixer(self, mixer: Mixer) -> Mixer:
        """This rank's channels and heads of the parameters."""
        A, D = (t.unflatten(0, (self.comm.size, -1))[self.comm.rank] for t in (mixer.A, mixer.D))
        conv = mixer.conv
        if conv:
            weight, bias = (self._channels(t)[self.comm.rank] for t in (conv.weight.t(), conv.bias[None]))
            conv = Conv(weight.t(), bias[0])
        return Mixer(conv, A, D, self.sizes)

    def state(self, state: MambaState) -> MambaState:
        """This rank's channels and heads of the states."""
        ssm = state.ssm.unflatten(1, (self.comm.size, -1))[:, self.comm.rank]
        conv = state.conv.index_select(1, self._places(state.conv)[self.comm.rank])
        return MambaState(conv, ssm.contiguous())

    @torch.no_grad()
    def keep(self, own: MambaState, state: MambaState) -> None:
        """Write the states of all channels and heads, in one all-gather."""
        own_parts, wide = (own.conv, own.ssm), torch.promote_types(own.conv.dtype, own.ssm.dtype)
        rows = self.comm.all_gather(torch.cat([t.flatten().to(wide) for t in own_parts]))
        flat = rows.split([t.numel() for t in own_parts], dim=1)
        conv, ssm = (
            new.view(self.comm.size, *t.shape).transpose(0, 1).flatten(1, 2).to(t.dtype)
            for new, t in zip(flat, own_parts, strict=True)
        )
        state.conv.index_copy_(1, self._places(state.conv).flatten(), conv)
        state.ssm.copy_(ssm)

    def _places(self, conv: Tensor) -> Tensor:
        """Which channels each rank has: ``[ranks, own]``."""
        numbers = torch.arange(conv.shape[1], dtype=torch.float32, device=conv.device)
        return self._channels(numbers.unsqueeze(0)).squeeze(1).long()

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
