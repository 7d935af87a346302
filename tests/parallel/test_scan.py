"""A scan shared by ranks equals the scan on one: outputs, and gradients summed over ranks."""

import random

import pytest
import torch
from torch import Tensor

from weft.nn.slots import Conv, Scan
from weft.ops.segments import Segments
from weft.parallel.comm import Comm
from weft.parallel.ledger import LedgerComm, record
from weft.parallel.scan import ContextScan
from weft.parallel.threads import run_threads

HEADS, DIM, STATE, CHUNK = 12, 2, 3, 4
FORMS = ["states", "all_to_all"]
# Documents, tokens of each rank.
CASES = [
    ((16,), (8, 8)),
    ((9, 7), (10, 6)),
    ((20,), (3, 9, 8)),
    ((4, 12, 3, 1), (9, 5, 6)),  # a document begins, goes on and ends; another begins inside a rank
    ((5, 11), (2, 2, 12)),  # fewer tokens than taps
    ((17,), (8, 1, 1, 7)),
    ((17,), (8, 0, 2, 7)),
    ((3, 14), (0, 4, 1, 12)),
    ((16,), (7, 8, 1, 0)),
    ((2, 1, 14), (1, 1, 1, 14)),  # a document begins just before a rank does
    ((6, 6, 6), (6, 8, 4)),  # a document ends where a rank does
    ((8, 8, 5), (8, 4, 9)),
    ((21,), (0, 0, 20, 1)),
    ((0, 7, 0, 0, 9, 0), (3, 4, 9)),
    ((1, 1, 20), (3, 18, 1)),
]


def inputs(tokens: int, groups: int, taps: int, seed: int = 0) -> list[Tensor]:
    """xBC, weight, bias, dt, A, D."""
    generator = torch.Generator().manual_seed(seed)
    channels = HEADS * DIM + 2 * groups * STATE

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt, A = normal(tokens, HEADS).exp() / 4, -normal(HEADS).exp()
    return [normal(tokens, channels), normal(channels, taps), normal(channels), dt, A, normal(HEADS)]


def run(scan: Scan, given: list[Tensor], segments: Segments, groups: int) -> Tensor:
    """The slot as layers call it: with a convolution where there are taps, the scan alone where not."""
    xBC, weight, bias, dt, A, D = given
    if weight.shape[1]:
        return scan.convolved(xBC, Conv(weight, bias), dt, A, D, (groups, STATE), segments)
    x, B, C = xBC.split([HEADS * DIM, groups * STATE, groups * STATE], dim=1)
    x, B, C = x.unflatten(1, (HEADS, DIM)), B.unflatten(1, (groups, STATE)), C.unflatten(1, (groups, STATE))
    return scan(x, dt, A, B, C, D, segments)


def grads(y: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    got = torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(got, leaves, strict=True)]


def check(form: str, lengths: tuple[int, ...], counts: tuple[int, ...], groups: int, taps: int) -> None:
    segments = Segments(lengths)
    given = [t.requires_grad_() for t in inputs(segments.tokens, groups, taps)]
    want = run(Scan(CHUNK), given, segments, groups)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    want_grads = grads(want, given, cotangent)

    def work(comm: Comm) -> list[Tensor]:
        def here(t: Tensor) -> Tensor:
            return t.detach().split(list(counts))[comm.rank]

        own = [here(t) if i in (0, 3) else t.detach().clone() for i, t in enumerate(given)]
        own = [t.requires_grad_() for t in own]
        y = run(ContextScan(CHUNK, comm, form), own, segments.part(counts, comm.rank), groups)
        return [y, *grads(y, own, here(cotangent))]

    y, *got = zip(*run_threads(len(counts), work, timeout=20), strict=True)
    got = [torch.cat(parts) if i in (0, 3) else sum(parts) for i, parts in enumerate(got)]
    for one, other in zip([want, *want_grads], [torch.cat(y), *got], strict=True):
        assert one.shape == other.shape
        if one.numel():
            assert (one - other).abs().max() <= 1e-12 * max(1.0, one.abs().max().item())


@pytest.mark.parametrize(("form", "taps"), [("states", 4), ("states", 0), ("all_to_all", 4)])
@pytest.mark.parametrize(("lengths", "counts"), CASES)
def test_equals_one_rank(form, lengths, counts, taps):
    check(form, lengths, counts, groups=1, taps=taps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("groups", "ranks"), [(2, 2), (2, 4), (6, 3), (6, 2), (4, 4), (3, 3)])
def test_groups(form, groups, ranks):
    counts = (5, 0, 6, 3)[:ranks]
    check(form, (2, sum(counts) - 2), counts, groups, 3)


@pytest.mark.parametrize("taps", [1, 2])
def test_few_taps(taps):
    check("states", (3, 12), (4, 1, 0, 10), 2, taps)


@pytest.mark.parametrize("seed", range(12))
def test_any_cut(seed):
    draw = random.Random(seed)
    ranks = draw.choice([2, 3, 4])
    counts = tuple(draw.choice([0, 1, 2, 3, 5, 9]) for _ in range(ranks - 1)) + (draw.randint(1, 9),)
    left, lengths = sum(counts), []
    while left:
        lengths.append(draw.randint(1, min(left, draw.choice([2, 6, 20]))))
        left -= lengths[-1]
    for form in FORMS:
        check(form, tuple(lengths), counts, draw.choice([1, ranks]), draw.choice([0, 4]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("taps", [4, 0])
def test_nothing_is_exchanged_where_no_document_crosses(form, taps):
    def work(comm: Comm) -> None:
        segments = Segments((3, 5, 0, 8)).part((8, 0, 8), comm.rank)
        given = [t.requires_grad_() for t in inputs(segments.tokens, 1, taps)]
        with record(comm) as ledger:
            y = run(ContextScan(CHUNK, comm, form), given, segments, 1)
            y.sum().backward()
        assert not ledger.entries
        assert torch.equal(y, run(Scan(CHUNK), given, Segments(segments.lengths), 1))

    run_threads(3, work)


@pytest.mark.parametrize("taps", [4, 0])
def test_one_gather_of_the_stated_bytes(taps):
    """Each way: of every other rank a decay per head, a state, and the edges of the convolution."""
    channels = HEADS * DIM + 2 * STATE
    numbers = HEADS + HEADS * DIM * STATE
    numbers += (taps - 1) * (2 * channels + HEADS) if taps else 0

    def work(comm: Comm) -> None:
        segments = Segments((3, 17)).part((9, 0, 11), comm.rank)
        given = [t.requires_grad_() for t in inputs(segments.tokens, 1, taps)]
        with record(comm) as ledger:
            y = run(ContextScan(CHUNK, comm, "states"), given, segments, 1)
        assert [(entry.op, entry.bytes) for entry in ledger.entries] == [("all_gather", 2 * 8 * numbers)]
        with record(comm) as ledger:
            y.sum().backward()
        assert [(entry.op, entry.bytes) for entry in ledger.entries] == [("reduce_scatter", 2 * 8 * numbers)]

    run_threads(3, work)


def test_one_exchange_each_way():
    """Forward in: x, dt, B and C of this rank's heads; out: y. Backward the other way round."""
    counts, channels = (9, 0, 11), HEADS * DIM // 3 + 2 * STATE

    def work(comm: Comm) -> None:
        segments = Segments((3, 17)).part(counts, comm.rank)
        given = [t.requires_grad_() for t in inputs(segments.tokens, 1, 4)]
        with record(comm) as ledger:
            run(ContextScan(CHUNK, comm, "all_to_all"), given, segments, 1).sum().backward()
        mine, others = counts[comm.rank], 20 - counts[comm.rank]
        there, back = 8 * (channels + HEADS // 3), 8 * HEADS * DIM // 3
        want = [others * there, 2 * mine * back, others * back, 2 * mine * there]
        assert [(entry.op, entry.bytes) for entry in ledger.entries] == [("all_to_all", n) for n in want]

    run_threads(3, work)


@pytest.mark.parametrize("form", FORMS)
def test_low_precision(form):
    """bf16 channels, fp32 time steps: the states and what travels of them stay fp32."""
    counts, segments = (6, 9), Segments((3, 12))
    given = inputs(15, 2, 4)
    low = [t.bfloat16() if i < 3 else t.float() for i, t in enumerate(given)]
    want = run(Scan(CHUNK), low, segments, 2)

    def work(comm: Comm) -> Tensor:
        own = [t.split(counts)[comm.rank] if i in (0, 3) else t.clone() for i, t in enumerate(low)]
        own = [t.requires_grad_() for t in own]
        y = run(ContextScan(CHUNK, comm, form), own, segments.part(counts, comm.rank), 2)
        got = torch.autograd.grad(y.float().sum(), own)
        assert [g.dtype for g in got] == [t.dtype for t in own]
        return y

    y = torch.cat(run_threads(2, work))
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_alone_on_meta_tensors(form, rank):
    comm, counts = LedgerComm(rank, 4), (2**18,) * 4
    segments = Segments((1000, 2**20 - 1000)).part(counts, rank)
    given = [t.to("meta") for t in inputs(1, 1, 4)]
    given = [t.expand(2**18, -1) if i in (0, 3) else t for i, t in enumerate(given)]
    given = [t.detach().requires_grad_() for t in given]
    with record(comm) as ledger:
        y = run(ContextScan(4096, comm, form), given, segments, 1)
        y.sum().backward()
    assert y.shape == (2**18, HEADS, DIM)
    assert len(ledger.entries) == (2 if form == "states" else 4)


@pytest.mark.parametrize(
    ("ranks", "groups", "said"),
    [(5, 1, "5 cp ranks"), (4, 6, "cp 4 and 6 groups"), (3, 2, "cp 3 and 2 groups")],
)
def test_heads_that_cannot_be_shared_are_refused(ranks, groups, said):
    comm, segments = LedgerComm(1, ranks), Segments((20 * ranks,)).part((20,) * ranks, 1)
    with pytest.raises(ValueError, match=said):
        run(ContextScan(CHUNK, comm, "all_to_all"), inputs(20, groups, 4), segments, groups)
