"""Attention of runs equals explicit softmax over what queries may see; joined parts equal the whole."""

import pytest
import torch

from weft.ops.attention import attend, attend_runs, attend_runs_backward
from weft.ops.backend import use
from weft.ops.segments import Segments
from weft.plan.runs import Piece, Run, contiguous, pieces

SCALE = 0.3
LENGTHS = (40, 1, 300, 7, 7, 7, 20)
TOKENS = sum(LENGTHS)


def inputs(queries, keys, heads=4, kv_heads=2, dim=8, dtype=torch.float64):
    return [
        torch.randn(n, h, dim, dtype=dtype) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    ]


def runs_of(*spans):
    return tuple(Run(start, stop - start) for start, stop in spans)


CASES = {
    "documents": (contiguous((TOKENS,))[0], contiguous((TOKENS,))[0]),
    "later": (
        runs_of((200, 345)),
        runs_of((0, 345)),
    ),  # and keys of other documents
    "zigzag": (runs_of((41, 60), (300, 341)), runs_of((41, 80), (290, 341), (360, 370))),
    "earlier": (runs_of((41, 100)), runs_of((80, 341))),
    "none": ((), runs_of((3, 9))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_softmax(case, kv_heads):
    held = CASES[case]
    blocks = pieces(LENGTHS, *held)
    given = inputs(*(sum(run.length for run in runs) for runs in held), kv_heads=kv_heads)
    grad = torch.randn_like(given[0])
    found = []
    for backend in ("reference", "fast"):
        with use(attention=backend):
            out, lse = attend_runs(*given, blocks, SCALE)
            found.append((out, lse, *attend_runs_backward(grad, out, lse, *given, blocks, SCALE)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_twin_equals_autograd():
    """The formula of the gradient against autograd through explicit scores, unseen queries included."""
    blocks = pieces(LENGTHS, *CASES["later"])
    given = [t.requires_grad_() for t in inputs(145, 345)]
    with use(attention="reference"):
        out, lse = attend_runs(*given, blocks, SCALE)
        grad = torch.randn_like(out)
        want = torch.autograd.grad(out, given, grad)
        got = attend_runs_backward(
            grad, out.detach(), lse.detach(), *(t.detach() for t in given), blocks, SCALE
        )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_parts_join(backend):
    """Keys in three parts, in any order, equal all keys at once and attention of documents."""
    whole = Run(0, TOKENS)
    q, k, v = inputs(TOKENS, TOKENS)
    wanted = attend(q, k, v, Segments(LENGTHS), SCALE)
    grad = torch.randn_like(q)
    with use(attention=backend):
        all_pieces = pieces(LENGTHS, (whole,), (whole,))
        out, lse = attend_runs(q, k, v, all_pieces, SCALE)
        grads = attend_runs_backward(grad, out, lse, q, k, v, all_pieces, SCALE)
        state, sums = None, [torch.zeros_like(t) for t in (q, k, v)]
        for start, stop in ((90, 200), (200, TOKENS), (0, 90)):
            part = pieces(LENGTHS, (whole,), runs_of((start, stop)))
            state = attend_runs(q, k[start:stop], v[start:stop], part, SCALE, state)
            own = attend_runs_backward(grad, out, lse, q, k[start:stop], v[start:stop], part, SCALE)
            sums[0] += own[0]
            sums[1][start:stop] += own[1]
            sums[2][start:stop] += own[2]
    for a, b in zip((out, *state, *sums), (wanted, out, lse, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_queries_without_keys():
    given = inputs(3, 2)
    out, lse = attend_runs(*given, (Piece(Run(1, 1), Run(0, 2), 1),), SCALE)
    assert out[[0, 2]].eq(0).all()
    assert lse[[0, 2]].eq(-torch.inf).all()
    assert lse[1].isfinite().all()
    got = attend_runs_backward(torch.ones_like(out), out, lse, *given, (), SCALE)
    assert all(t.eq(0).all() for t in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_wide(dtype):
    """Against fp64 of the same inputs: outputs, sums and gradients in fp32, accurate to fp32."""
    blocks = pieces(LENGTHS, *CASES["zigzag"])
    given = inputs(60, 100, dtype=dtype)
    grad = torch.randn_like(given[0])
    found = []
    for inner in (given, [t.double() for t in given]):
        out, lse = attend_runs(*inner, blocks, SCALE)
        found.append(
            (out, lse, *attend_runs_backward(grad.to(inner[0].dtype), out, lse, *inner, blocks, SCALE))
        )
    for got, want in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_meta():
    """Shapes without values, however long."""
    blocks = pieces((2**20,), (Run(2**19, 2**19),), (Run(0, 2**20),))
    q, k, v = (
        t.to("meta")
        for t in (torch.empty(2**19, 4, 8, device="meta"), *2 * [torch.empty(2**20, 2, 8, device="meta")])
    )
    out, lse = attend_runs(q, k, v, blocks, SCALE)
    grads = attend_runs_backward(out, out, lse, q, k, v, blocks, SCALE)
    assert [t.shape for t in grads] == [q.shape, k.shape, v.shape]
