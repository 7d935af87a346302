"""Attention of pieces: back ends agree, pieces give what whole sequences give, nothing gives nothing."""

import pytest
import torch

from weft.ops.attention import attend_pieces, whole
from weft.plan.items import Piece, Pieces

SCALE = 0.3
CASES = {
    "equal": [(0, 5, 5), (0, 5, 5), (0, 5, 5)],
    "ragged": [(0, 1, 1), (0, 9, 9), (0, 4, 4), (0, 4, 4)],
    "cut": [(2, 5, 9), (0, 4, 4), (3, 3, 6), (8, 9, 9)],
    "one sequence twice": [(0, 3, 7), (3, 7, 7)],
    "nothing": [],
    "no rows": [(0, 6, 6), (0, 0, 0), (4, 4, 4)],
}


def rows_of(cuts):
    return [Piece(i, *cut) for i, cut in enumerate(cuts)]


def inputs(pieces, heads=3, dim=4, dtype=torch.float64):
    queries, keys = sum(p.rows for p in pieces), sum(p.whole for p in pieces)
    return [torch.randn(n, heads, dim, dtype=dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("case", CASES)
def test_equals_softmax(twins, case, biased, monkeypatch):
    monkeypatch.setattr(whole, "SCORES", 50)  # several blocks of queries
    pieces = rows_of(CASES[case])
    given = inputs(pieces)
    some = [i for i, piece in enumerate(pieces) if piece.rows]
    if biased:
        given += [torch.randn(3, pieces[i].rows, pieces[i].whole, dtype=torch.float64) for i in some]

    def call(q, k, v, *biases):
        bias = (lambda i, rows: biases[some.index(i)][:, rows]) if biased else None
        return attend_pieces(q, k, v, pieces, SCALE, bias)

    twins("attention", call, given, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_reduced_precision(twins, dtype, tolerance):
    pieces = rows_of([(0, 40, 40), (7, 30, 64)])
    twins("attention", lambda *t: attend_pieces(*t, pieces, SCALE), inputs(pieces, dtype=dtype), tolerance)


def test_pieces_equal_the_whole():
    """Rows of sequences cut over three ranks, each with all keys, against all of it at once."""
    everything = rows_of([(0, 7, 7), (0, 11, 11), (0, 2, 2)])
    starts = (0, 7, 18)
    leaves = [t.requires_grad_() for t in inputs(everything)]
    q, k, v = leaves
    want = attend_pieces(q, k, v, everything, SCALE)
    cotangent = torch.randn_like(want)
    wanted = torch.autograd.grad(want, leaves, cotangent)
    cuts = [[(0, 0, 4, 7), (1, 0, 11, 11)], [(0, 4, 7, 7)], [(2, 0, 2, 2)]]
    sums = [torch.zeros_like(t) for t in leaves]
    for own in range(3):
        pieces = Pieces(((),) * 3, tuple(tuple(Piece(*cut) for cut in rank) for rank in cuts), own)
        here = [starts[p.sequence] + i for p in pieces.here for i in range(p.start, p.stop)]
        keys = [starts[p.sequence] + i for p in pieces.reach(None) for i in range(p.start, p.stop)]
        got = attend_pieces(q[here], k[keys], v[keys], pieces.here, SCALE)
        torch.testing.assert_close(got, want[here], rtol=0, atol=1e-12)
        for total, gradient in zip(sums, torch.autograd.grad(got, leaves, cotangent[here]), strict=True):
            total += gradient
    torch.testing.assert_close(sums, list(wanted), rtol=0, atol=1e-12)


def test_without_gradients_under_a_bias():
    pieces = rows_of([(0, 6, 6), (2, 5, 9)])
    given, biases = inputs(pieces), [torch.randn(3, p.rows, p.whole, dtype=torch.float64) for p in pieces]
    with torch.no_grad():
        got = attend_pieces(*given, pieces, SCALE, lambda i, rows: biases[i][:, rows])
    want = attend_pieces(*given, pieces, SCALE, lambda i, rows: biases[i][:, rows])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
