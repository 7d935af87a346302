"""The fused convolution equals ``conv1d`` and SiLU, document by document."""

import pytest
import torch

from weft.ops.conv import causal_conv, conv_step
from weft.ops.segments import Segments


def inputs(tokens, segments, channels=6, taps=4, dtype=torch.float64):
    shapes = [(tokens, channels), (channels, taps), (channels,), (segments, channels, taps - 1)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("lengths", [(8, 8), (1, 2, 3, 4, 9), (9,), (1, 1, 1), (3, 0, 2), (700, 1, 300)])
@pytest.mark.parametrize("with_initial", [True, False])
@pytest.mark.parametrize("taps", [4, 2, 1])
def test_equals_reference(twins, lengths, with_initial, taps):
    segments = Segments(lengths)

    def call(*t):
        return causal_conv(*t[:3], segments, t[3] if with_initial else None, return_final=True)

    given = inputs(segments.tokens, len(lengths), taps=taps)
    twins("conv", call, given if with_initial else given[:3], 1e-10)
    twins("conv", lambda *t: causal_conv(*t, segments), given[:3], 1e-10)


def test_fp32(twins):
    """fp32 against fp32: 1e-5 of the largest element (sums over 300 tokens)."""
    segments = Segments((200, 100))
    twins("conv", lambda *t: causal_conv(*t, segments), inputs(300, 2, dtype=torch.float32)[:3], 1e-5)


def test_gradcheck():
    segments = Segments((5, 2))
    given = [t.requires_grad_() for t in inputs(7, 2, channels=2, taps=3)]
    assert torch.autograd.gradcheck(
        lambda *t: causal_conv(*t[:3], segments, t[3], return_final=True), given, fast_mode=True
    )


def test_bf16_is_computed_wide():
    given = [t.bfloat16() for t in inputs(20, 2)]
    want = causal_conv(*(t.double() for t in given[:3]), Segments((12, 8)))
    got = causal_conv(*given[:3], Segments((12, 8)))
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 2**-8 * want.abs().max()


def test_input_may_be_a_view():
    x, weight, bias, _ = inputs(30, 1)
    view = torch.cat([x, x, x], dim=1)[:, 6:12]
    assert torch.equal(
        causal_conv(view, weight, bias, Segments((30,))), causal_conv(x, weight, bias, Segments((30,)))
    )


@pytest.mark.parametrize("taps", [4, 1])
def test_step_equals_whole(taps):
    x, weight, bias, state = inputs(18, 3, taps=taps)
    want, final = causal_conv(x, weight, bias, Segments((6, 6, 6)), state, return_final=True)
    steps = x.view(3, 6, -1)
    got = torch.stack([conv_step(state, steps[:, t], weight, bias) for t in range(6)], 1).flatten(0, 1)
    assert (got - want).abs().max() <= 1e-10
    assert torch.allclose(state, final, rtol=0, atol=1e-10)
