"""Attention equals explicit softmax; cached attention equals attention over everything."""

import pytest
import torch

from weft.ops.attention import attend, attend_cached
from weft.ops.backend import use
from weft.ops.segments import Segments

SCALE = 0.3


def inputs(tokens, heads=4, kv_heads=2, dim=8, dtype=torch.float64):
    return [torch.randn(tokens, n, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("lengths", [(8, 8), (1, 2, 3, 3, 9), (9,), (3, 0, 2), (40, 5, 40), (300, 1, 300)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_softmax(twins, lengths, kv_heads):
    segments = Segments(lengths)
    twins(
        "attention", lambda *t: attend(*t, segments, SCALE), inputs(segments.tokens, kv_heads=kv_heads), 1e-10
    )


def test_fp32(twins):
    """fp32 against fp32: 1e-5 of the largest element."""
    segments = Segments((64, 32))
    twins("attention", lambda *t: attend(*t, segments, SCALE), inputs(96, dtype=torch.float32), 1e-5)


def test_bf16(twins):
    """bf16 against bf16 computed in fp32: 2e-2 of the largest element."""
    segments = Segments((64, 32, 32))
    twins("attention", lambda *t: attend(*t, segments, SCALE), inputs(128, dtype=torch.bfloat16), 2e-2)


def test_gradcheck():
    segments = Segments((4, 2))
    given = [t.requires_grad_() for t in inputs(6, heads=2, kv_heads=1, dim=2)]
    assert torch.autograd.gradcheck(lambda *t: attend(*t, segments, SCALE), given, fast_mode=True)


@pytest.mark.parametrize(
    ("past", "new"),
    [
        ((5, 5), (1, 1)),  # decode
        ((5, 2, 7), (1, 1, 1)),  # decode, ragged
        ((0, 0), (6, 6)),  # prefill
        ((0, 3, 3), (4, 2, 2)),  # chunks of a prefill
        ((6, 0, 2), (1, 5, 0)),  # mixed, one sequence idle
    ],
)
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_cached_equals_whole(past, new, backend):
    """New tokens over a cache give what attention over all tokens gives for them."""
    whole = Segments(tuple(p + n for p, n in zip(past, new, strict=True)))
    q, k, v = inputs(whole.tokens)
    want = attend(q, k, v, whole, SCALE)
    keys, values = (torch.zeros(len(past), 2, 12, 8, dtype=torch.float64) for _ in range(2))
    fresh = []
    for s, (start, held, added) in enumerate(zip(whole.starts, past, new, strict=True)):
        keys[s, :, :held] = k[start : start + held].transpose(0, 1)
        values[s, :, :held] = v[start : start + held].transpose(0, 1)
        fresh += range(start + held, start + held + added)
    with use(attention=backend):
        got = attend_cached(q[fresh], k[fresh], v[fresh], keys, values, Segments(new), past, SCALE)
    assert (got - want[fresh]).abs().max() <= 1e-10
    for s, (start, end) in enumerate(zip(whole.starts, whole.lengths, strict=True)):
        assert torch.equal(keys[s, :, :end], k[start : start + end].transpose(0, 1))
        assert torch.equal(values[s, :, :end], v[start : start + end].transpose(0, 1))
