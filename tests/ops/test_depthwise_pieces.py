"""Depthwise convolution over pieces: against torch's over whole sequences, however they are cut."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.backend import use
from weft.ops.conv import around, depthwise
from weft.plan.items import Piece, reach

CUTS = {
    "whole": ([7, 1, 20], [[(0, 0, 7), (1, 0, 1), (2, 0, 20)]]),
    "cut": ([20, 9], [[(0, 0, 3)], [(0, 3, 4), (1, 0, 8)], [(0, 4, 20)], [(1, 8, 9)]]),
    "shuffled": ([11, 5], [[(1, 2, 5), (0, 6, 11), (0, 0, 2)], [(0, 2, 6), (1, 0, 2)]]),
    "empty": ([5], [[], [(0, 0, 5)], [(0, 3, 3)]]),
}


def whole(sequences: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    half, channels = weight.shape[1] // 2, weight.shape[0]
    return [
        F.conv1d(x.t()[None], weight[:, None], bias, padding=half, groups=channels)[0].t() for x in sequences
    ]


@pytest.mark.parametrize("backend", ["reference", "fast"])
@pytest.mark.parametrize("taps", [1, 3, 9])
@pytest.mark.parametrize("cut", CUTS)
def test_cut_equals_whole(cut: str, taps: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(around, "BLOCK_NUMBERS", 24)  # several blocks in a piece
    lengths, ranks = CUTS[cut]
    torch.manual_seed(taps)
    xs = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in lengths]
    weight = torch.randn(6, taps, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True) if taps > 1 else None
    leaves = [*xs, weight, *([bias] if bias is not None else [])]
    factors = [torch.randn(n, 6, dtype=torch.float64) for n in lengths]

    wanted = whole(xs, weight, bias)
    expected = torch.autograd.grad(
        torch.stack([(y * f).sum() for y, f in zip(wanted, factors, strict=True)]).sum(), leaves
    )
    totals = []
    for rank in ranks:
        pieces = tuple(Piece(s, a, b, lengths[s]) for s, a, b in rank)
        around_rows = [reach(p, taps // 2) for p in pieces]
        seen = torch.cat([xs[0][:0], *(xs[p.sequence][p.start : p.stop] for p in around_rows)])
        with use(conv=backend):
            y = depthwise(seen, weight, bias, pieces)
        rows = torch.cat([xs[0][:0], *(wanted[p.sequence][p.start : p.stop] for p in pieces)])
        factor = torch.cat([xs[0][:0], *(factors[p.sequence][p.start : p.stop] for p in pieces)])
        torch.testing.assert_close(y, rows, rtol=1e-12, atol=1e-12)
        totals.append((y * factor).sum())
    found = torch.autograd.grad(torch.stack(totals).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_low_precision_adds_up_in_fp32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 8), torch.randn(8, 9)
    pieces = (Piece(0, 0, 40, 40),)
    low, exact = x.bfloat16(), whole([x.bfloat16().float()], weight.bfloat16().float(), None)[0]
    torch.testing.assert_close(depthwise(low, weight.bfloat16(), None, pieces), exact.bfloat16())
