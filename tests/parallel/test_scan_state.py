"""Documents that ranks share go on from states: outputs, and the states after them, equal one rank's."""

import random

import pytest
import torch
from torch import Tensor

from weft.nn.slots import Conv, Scan
from weft.nn.state import MambaState
from weft.ops.segments import Segments
from weft.parallel.comm import Comm
from weft.parallel.ledger import Ledger, LedgerComm, record
from weft.parallel.scan import ContextScan
from weft.parallel.threads import run_threads

HEADS, DIM, STATE, CHUNK = 12, 2, 3, 4
FORMS = ["states", "all_to_all"]
# Documents, tokens of each rank.
CASES = [
    ((16,), (8, 8)),
    ((9, 7), (10, 6)),
    ((4, 12, 3, 1), (9, 5, 6)),
    ((5, 11), (2, 2, 12)),
    ((17,), (8, 0, 2, 7)),  # a rank without tokens
    ((2,), (1, 1)),  # a document that crosses is shorter than the convolution
    ((1, 2, 1), (2, 2)),
    ((3,), (1, 0, 1, 1)),
    ((1, 3, 0, 1, 2), (0, 2, 2, 3)),
    ((0, 7, 0, 0, 9, 0), (3, 4, 9)),  # documents without tokens, also between two ranks
    ((6, 6, 6), (6, 8, 4)),
    ((2, 0, 2, 0, 9, 1), (7, 0, 7)),
    ((8, 0, 8, 3), (8, 8, 3)),  # none crosses
    ((0, 3, 5), (0, 8)),
    ((1, 1, 1, 1), (2, 0, 2)),  # one token of each
    ((0, 0), (0, 0, 0)),
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(groups: int, taps: int) -> tuple[Conv, Tensor, Tensor]:
    channels = HEADS * DIM + 2 * groups * STATE
    return Conv(normal(0, channels, taps), normal(1, channels)), -normal(2, HEADS).exp(), normal(3, HEADS)


def run(
    scan: Scan, xBC: Tensor, dt: Tensor, groups: int, taps: int, segments: Segments, state: MambaState
) -> Tensor:
    """With a convolution where there are taps, the scan alone where not."""
    conv, A, D = parameters(groups, taps)
    if taps:
        return scan.convolved(xBC, conv, dt, A, D, (groups, STATE), segments, state)
    x, B, C = xBC.split([HEADS * DIM, groups * STATE, groups * STATE], dim=1)
    x, B, C = x.unflatten(1, (HEADS, DIM)), B.unflatten(1, (groups, STATE)), C.unflatten(1, (groups, STATE))
    return scan(x, dt, A, B, C, D, segments, state)


def states(docs: int, groups: int, taps: int) -> MambaState:
    conv = normal(4, docs, HEADS * DIM + 2 * groups * STATE, max(taps - 1, 0))
    return MambaState(conv, normal(5, docs, HEADS, DIM, STATE))


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-12)


Chunk = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of each document, tokens of each rank


def check(form: str, chunks: list[Chunk], groups: int, taps: int) -> list[list[Ledger]]:
    """Chunks of the same documents, one after another, equal one rank that gets each document in one piece.

    Returns the collectives of each rank in each chunk.
    """
    whole = Segments(tuple(map(sum, zip(*(lengths for lengths, _ in chunks), strict=True))))
    xBC = normal(6, whole.tokens, HEADS * DIM + 2 * groups * STATE)
    dt = normal(7, whole.tokens, HEADS).exp() / 4
    want_state = states(len(whole.lengths), groups, taps)
    want = run(Scan(CHUNK), xBC, dt, groups, taps, whole, want_state)
    each = [torch.arange(n).split([c[0][i] for c in chunks]) for i, n in enumerate(whole.lengths)]
    pieces, starts = list(zip(*each, strict=True)), torch.tensor(whole.starts)
    orders = [torch.cat([start + own for start, own in zip(starts, piece, strict=True)]) for piece in pieces]

    def work(comm: Comm) -> tuple[list[Tensor], MambaState, list[Ledger]]:
        scan, state, out = ContextScan(CHUNK, comm, form), states(len(whole.lengths), groups, taps), []
        ledgers = []
        for (lengths, counts), order in zip(chunks, orders, strict=True):
            own = order.split(list(counts))[comm.rank]
            segments = Segments(lengths).part(counts, comm.rank)
            with record(comm) as ledger:
                out.append(run(scan, xBC[own], dt[own], groups, taps, segments, state))
            ledgers.append(ledger)
        return out, state, ledgers

    done = run_threads(len(chunks[0][1]), work, timeout=20)
    for at, order in enumerate(orders):
        assert close(torch.cat([y[at] for y, _, _ in done]), want[order])
    for _, state, _ in done:
        assert close(state.ssm, want_state.ssm)
        assert close(state.conv, want_state.conv)
        assert torch.equal(state.ssm, done[0][1].ssm)
        assert torch.equal(state.conv, done[0][1].conv)
    return [ledgers for _, _, ledgers in done]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("taps", [4, 1, 0])
@pytest.mark.parametrize(("lengths", "counts"), CASES)
def test_equals_one_rank(form, taps, lengths, counts):
    ranks = len(counts)
    check(form, [(lengths, counts)], 1 if taps else ranks, taps)


def drawn(draw: random.Random, docs: int, ranks: int) -> Chunk:
    lengths = tuple(draw.choice([0, 1, 2, 3, 5, 12]) for _ in range(docs))
    edges = sorted(draw.randint(0, sum(lengths)) for _ in range(ranks - 1))
    return lengths, tuple(b - a for a, b in zip([0, *edges], [*edges, sum(lengths)], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(16))
def test_goes_on_as_one_piece(form, seed):
    """Chunks with any cuts of any documents."""
    draw = random.Random(seed)
    ranks, docs = draw.choice([2, 3, 4]), draw.randint(1, 5)
    chunks = [drawn(draw, docs, ranks) for _ in range(2)]
    check(form, chunks, draw.choice([1, 2, 6] if ranks == 2 else [1, ranks]), draw.choice([4, 4, 2, 0]))


def ledger(form: str, lengths: tuple[int, ...], counts: tuple[int, ...]) -> list[tuple[str, int]]:
    """Collectives of rank 0 and their bytes."""
    return [(e.op, e.bytes) for e in check(form, [(lengths, counts)], 1, 4)[0][0].entries]


CHANNELS = HEADS * DIM + 2 * STATE
ROW = 8 * (HEADS * DIM * STATE + 3 * CHANNELS)  # a state of a document
PACKET = 8 * (HEADS + HEADS * DIM * STATE + 3 * (2 * CHANNELS + HEADS))


@pytest.mark.parametrize(
    ("lengths", "counts", "want"),
    [
        ((12,), (4, 8), [("all_gather", PACKET)]),  # the states follow from what is gathered anyway
        ((12, 0, 4), (4, 8, 4), [("all_gather", 2 * PACKET)]),
        ((8, 8), (4, 12), [("all_gather", PACKET), ("all_to_all", ROW)]),  # one ends inside rank 1
        ((2, 8, 3, 3), (4, 12), [("all_gather", PACKET), ("all_to_all", 2 * ROW)]),
        ((2, 2, 8), (4, 8), [("all_to_all", ROW)]),  # none crosses: one document comes from rank 1
        ((0, 0), (0, 0), []),
    ],
)
def test_exchanges_what_is_needed(lengths, counts, want):
    assert ledger("states", lengths, counts) == want


def test_one_more_gather_with_heads():
    ops = ledger("all_to_all", (8, 4), (4, 8))
    assert [op for op, _ in ops] == ["all_to_all", "all_gather", "all_to_all"]
    assert ops[1][1] == 2 * 8 * (HEADS // 2 * DIM * STATE + 3 * (HEADS // 2 * DIM + 2 * STATE))


@pytest.mark.parametrize("form", FORMS)
def test_low_precision(form):
    """bf16 channels and convolution inputs, fp32 steps and scan states."""
    counts, segments = (6, 9, 3), Segments((3, 12, 1, 2))
    xBC, dt = normal(6, 18, CHANNELS).bfloat16(), normal(7, 18, HEADS).exp().float() / 4
    conv, A, D = parameters(1, 4)
    conv, A, D = Conv(*(t.bfloat16() for t in conv)), A.float(), D.float()

    def low() -> MambaState:
        state = states(4, 1, 4)
        return MambaState(state.conv.bfloat16(), state.ssm.float())

    want_state = low()
    want = Scan(CHUNK).convolved(xBC, conv, dt, A, D, (1, STATE), segments, want_state)

    def work(comm: Comm) -> tuple[Tensor, MambaState]:
        state, own = low(), (t.split(counts)[comm.rank] for t in (xBC, dt))
        x, steps = own
        part = segments.part(counts, comm.rank)
        return ContextScan(CHUNK, comm, form).convolved(x, conv, steps, A, D, (1, STATE), part, state), state

    done = run_threads(3, work)
    y = torch.cat([y for y, _ in done])
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().max() <= 2**-7 * want.abs().max()
    for _, state in done:
        assert torch.equal(state.conv, want_state.conv)
        assert torch.allclose(state.ssm, want_state.ssm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(9, 7), (8, 8)])
def test_a_state_of_other_documents_is_refused(lengths):
    segments = Segments(lengths).part((8, 8), 0)
    scan, state = ContextScan(CHUNK, LedgerComm(0, 2), "states"), states(1, 1, 4)
    xBC, dt = normal(6, 8, CHANNELS), normal(7, 8, HEADS).exp()
    with pytest.raises(ValueError, match="a state of 1 documents is given to a run of 2"):
        run(scan, xBC, dt, 1, 4, segments, state)
