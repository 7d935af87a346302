"""Attention over ranks equals attention on one, in every form; bytes are those that the plan names."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from weft.nn.slots import Attend, Conv
from weft.nn.state import KVState
from weft.ops.segments import Segments
from weft.parallel import attend as attend_module
from weft.parallel.attend import ContextAttend
from weft.parallel.comm import Comm
from weft.parallel.ledger import LedgerComm, record
from weft.parallel.scan import ContextScan
from weft.parallel.threads import run_threads
from weft.plan.context import (
    ATTEND_FORMS,
    SCAN_FORMS,
    AttendShape,
    ScanShape,
    attend_traffic,
    even,
    scan_traffic,
)

HEADS, DIM = 12, 4
# Documents and tokens of each rank; a document may cover several ranks, and ranks may have no tokens.
PACKS = {
    "one": ((37,), (37,)),
    "halves": ((37,), (19, 18)),
    "tiny": ((1, 2, 1, 1, 30, 3, 1, 1), (21, 19)),
    "inside": ((5, 5, 5), (5, 10)),
    "empty": ((9, 16), (0, 25, 0)),
    "first": ((40, 1, 1), (3, 0, 39)),
    "thirds": ((3, 50, 2, 9), (22, 21, 21)),
    "alike": ((16, 16, 16, 16), (20, 20, 24)),
    "quarters": ((300,), (75, 75, 75, 75)),
    "uneven": ((7, 0, 100, 1, 1, 30), (1, 90, 0, 48)),
    "nothing": ((), (0, 0)),
}


def given(tokens, kv_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, n, DIM) for n in (HEADS, kv_heads, kv_heads, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(module, q, k, v, grad, segments):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    y = module(*leaves, segments)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def over_ranks(form, whole, counts, tensors, comm: Comm):
    mine = [t.split(counts)[comm.rank] for t in tensors]
    with record(comm) as ledger:
        found = with_gradients(ContextAttend(comm, form), *mine, whole.part(counts, comm.rank))
    return found, ledger.bytes()


@pytest.mark.parametrize(
    ("form", "pack", "kv_heads"),
    [
        (form, pack, kv_heads)
        for form in ATTEND_FORMS
        for pack, (_, counts) in PACKS.items()
        for kv_heads in ((1, 2, HEADS) if pack in ("thirds", "quarters") else (2,))
        if form != "all_to_all" or len(counts) != 3 or kv_heads != 2
    ]
    + [("all_to_all", pack, 1) for pack in ("empty", "first", "alike")],
)
def test_equals_one_rank(form, pack, kv_heads):
    lengths, counts = PACKS[pack]
    tensors = given(sum(lengths), kv_heads)
    want = with_gradients(Attend(), *tensors, Segments(lengths))
    parts = run_threads(len(counts), partial(over_ranks, form, Segments(lengths), counts, tensors))
    for got, expected in zip(zip(*(part for part, _ in parts), strict=True), want, strict=True):
        torch.testing.assert_close(torch.cat(got), expected, rtol=0, atol=1e-12)
    shape = AttendShape(lengths, counts, HEADS, kv_heads, DIM, 8)
    assert [count for _, count in parts] == [rank.total for rank in attend_traffic(form, shape)]


@pytest.mark.parametrize("form", ATTEND_FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision(form, dtype, tolerance):
    """Against fp64 of the same numbers, relative to the largest; bytes of the dtype, sums in fp32."""
    lengths, counts = (200, 56), (90, 100, 66)
    tensors = given(256, 3, dtype)
    want = with_gradients(Attend(), *(t.double() for t in tensors), Segments(lengths))
    parts = run_threads(3, partial(over_ranks, form, Segments(lengths), counts, tensors))
    for got, expected in zip(zip(*(part for part, _ in parts), strict=True), want, strict=True):
        found = torch.cat(got)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    traffic = attend_traffic(form, AttendShape(lengths, counts, HEADS, 3, DIM, dtype.itemsize))
    assert [count for _, count in parts] == [rank.total for rank in traffic]


@pytest.mark.parametrize("form", ATTEND_FORMS)
def test_recomputation(form):
    """Collectives run again with the forward pass, on every rank."""
    lengths, counts = PACKS["thirds"]
    tensors = given(sum(lengths), 1)

    def work(comm: Comm):
        module, segments = ContextAttend(comm, form), Segments(lengths).part(counts, comm.rank)

        def again(*leaves):
            return checkpoint(module, *leaves[:3], segments, use_reentrant=False)

        mine = [t.split(counts)[comm.rank] for t in tensors]
        plain = with_gradients(lambda *args: module(*args), *mine, segments)
        for a, b in zip(with_gradients(again, *mine, segments), plain, strict=True):
            assert torch.equal(a, b)

    run_threads(3, work)


@pytest.mark.parametrize("form", ATTEND_FORMS)
def test_nothing_crosses_nothing_moves(form):
    whole, counts = Segments((5, 7, 4)), (12, 0, 4)

    def work(comm: Comm):
        mine = [t.split(counts)[comm.rank] for t in given(16, 3)]
        with record(comm) as ledger:
            with_gradients(ContextAttend(comm, form), *mine, whole.part(counts, comm.rank))
        return ledger.entries

    assert run_threads(3, work) == [[], [], []]


@pytest.mark.parametrize("form", ATTEND_FORMS)
def test_a_million_tokens_on_paper(form):
    """One rank of eight with shapes alone."""
    tokens, rank = 2**20, 5
    counts = even(tokens, 8)
    comm = LedgerComm(rank, 8)
    shapes = [(tokens // 8, heads, 128) for heads in (8, 2, 2, 8)]
    tensors = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes]
    with record(comm) as ledger:
        module = ContextAttend(comm, form)
        with_gradients(module, *tensors, Segments((tokens,)).part(counts, rank))
    want = attend_traffic(form, AttendShape((tokens,), counts, 8, 2, 128, 2))
    assert ledger.bytes() == want[rank].total


def test_exchanges_run_under_the_products(monkeypatch):
    """The ring launches the next exchange before it computes with what has come, both ways."""
    events = []

    class Told(LedgerComm):
        def start_all_to_all_v(self, *args):
            events.append("start")
            return super().start_all_to_all_v(*args)

        def all_to_all_v(self, *args):
            return super().start_all_to_all_v(*args).wait()

    for name in ("attend_runs", "attend_runs_backward"):
        inner = getattr(attend_module, name)
        told = lambda *args, inner=inner: (events.append("compute"), inner(*args))[1]  # noqa: E731
        monkeypatch.setattr(attend_module, name, told)
    counts = even(24, 3)
    tensors = [t[:8] for t in given(24, 3)]
    with_gradients(ContextAttend(Told(1, 3), "ring"), *tensors, Segments((24,)).part(counts, 1))
    # Forward: keys of two ranks, each under way while others are used. Backward: gradients go home besides.
    forward = ["start", "compute", "start", "compute", "compute"]
    assert events == forward + [*forward[:-1], "start", "compute", "start"]


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("form", SCAN_FORMS)
def test_bytes_of_the_scan(form, taps):
    """What the scan moves is what the plan says, with the convolution and without it."""
    lengths, counts = (3, 50, 2, 9), (22, 0, 42)
    heads, dim, groups, state = 6, 4, 3, 2
    channels = heads * dim + 2 * groups * state

    def work(comm: Comm):
        segments = Segments(lengths).part(counts, comm.rank)
        tokens = counts[comm.rank]
        xBC = torch.randn(tokens, channels, requires_grad=True)
        dt = torch.rand(tokens, heads, requires_grad=True)
        A, D = -torch.rand(heads), torch.rand(heads)
        scan = ContextScan(8, comm, form)
        with record(comm) as ledger:
            if taps > 1:
                conv = Conv(torch.randn(channels, taps), torch.zeros(channels))
                y = scan.convolved(xBC, conv, dt, A, D, (groups, state), segments)
            else:
                x, B, C = xBC.split([heads * dim, groups * state, groups * state], 1)
                B, C = (t.unflatten(1, (groups, state)) for t in (B, C))
                y = scan(x.unflatten(1, (heads, dim)), dt, A, B, C, D, segments)
            y.sum().backward()
        return ledger.bytes()

    shape = ScanShape(lengths, counts, heads, dim, groups, state, taps, 4, 4)
    assert run_threads(3, work) == [rank.total for rank in scan_traffic(form, shape)]


def test_refusals():
    comm = LedgerComm(0, 3)
    q, k, v, _ = (t[:2] for t in given(6, 2))
    segments = Segments((6,)).part((2, 2, 2), 0)
    with pytest.raises(ValueError, match="'rings' is no form"):
        ContextAttend(comm, "rings")
    with pytest.raises(ValueError, match="cp 3 and 2 kv heads"):
        ContextAttend(comm, "all_to_all")(q, k, v, segments)
    with pytest.raises(ValueError, match="over a cache"):
        ContextAttend(comm, "ring")(q, k, v, segments, KVState(k[None], v[None]), [0])
    with pytest.raises(ValueError, match="part 0 of 3 is on rank 0 of 2"):
        ContextAttend(LedgerComm(0, 2), "ring")(q, k, v, segments)
