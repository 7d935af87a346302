"""Rows in expert order and back: transposes of each other, summed in slot order."""

import pytest
import torch

from weft.ops.dispatch import collect, sort, spread

EXPERTS = 5


def choices(tokens, slots, missing=False):
    experts = torch.rand(tokens, EXPERTS).argsort(1)[:, :slots].contiguous()
    return experts.masked_fill_(torch.rand(experts.shape) < 0.4 * missing, -1)


def by_hand(experts, bound):
    """The pairs of each expert, in their own order, filled up with -1 and cut off at ``bound``."""
    flat = experts.flatten().tolist()
    rows = [[pair for pair, e in enumerate(flat) if e == expert] for expert in range(EXPERTS)]
    if bound is not None:
        rows = [(row + [-1] * bound)[:bound] for row in rows]
    return [len(row) for row in rows], [pair for row in rows for pair in row]


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("bound", [None, 0, 2, 7])
def test_sort(tokens, missing, bound):
    experts = choices(tokens, 3, missing)
    order, back, counts, full = sort(experts, EXPERTS, bound)
    assert (counts, order.tolist()) == by_hand(experts, bound)
    row = {pair: r for r, pair in enumerate(order.tolist()) if pair >= 0}
    assert back.flatten().tolist() == [row.get(pair, -1) for pair in range(3 * tokens)]
    assert full == (bound is None and bool((experts >= 0).all()))


def test_static_shapes_ask_nothing_of_the_device():
    """A meta tensor has no values to ask for."""
    experts = torch.empty(6, 2, dtype=torch.int64, device="meta")
    order, back, counts, full = sort(experts, EXPERTS, 4)
    assert (order.shape, back.shape, counts) == ((4 * EXPERTS,), (6, 2), [4] * EXPERTS)
    rows = spread(torch.empty(6, 3, device="meta"), order, back, full)
    assert collect(rows, order, back, full).shape == (6, 3)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("missing", "bound"), [(False, None), (True, None), (True, 3)])
def test_rows_and_back(tokens, dtype, missing, bound):
    experts = choices(tokens, 3, missing)
    order, back, _, full = sort(experts, EXPERTS, bound)
    x = torch.randn(tokens, 4).to(dtype)
    rows = spread(x, order, back, full)
    pairs = torch.cat([x.repeat_interleave(3, 0), x.new_zeros(1, 4)])
    assert torch.equal(rows, pairs[order])
    kept = (back >= 0).sum(1, keepdim=True).to(dtype)
    got = collect(rows, order, back, full)
    assert torch.allclose(got, kept * x, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(("missing", "bound"), [(False, None), (True, None), (False, 2), (True, 4)])
def test_transposes(missing, bound):
    """``<spread(x), r> == <x, collect(r)>``, forward and backward."""
    order, back, _, full = sort(choices(6, 2, missing), EXPERTS, bound)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(order), 4, dtype=torch.float64, requires_grad=True)
    there, here = (spread(x, order, back, full) * rows).sum(), (x * collect(rows, order, back, full)).sum()
    assert abs(there - here) < 1e-12
    assert torch.autograd.gradcheck(lambda t: spread(t, order, back, full), x)
    assert torch.autograd.gradcheck(lambda t: collect(t, order, back, full), rows)


def test_what_is_missing_brings_nothing_from_other_tokens():
    order, back, _, full = sort(torch.tensor([[0, 1], [-1, 2], [-1, -1]]), EXPERTS)
    x = torch.tensor([[float("nan")], [1.0], [1.0]])
    got = collect(spread(x, order, back, full), order, back, full)
    assert got[0].isnan()
    assert got[1:].tolist() == [[1.0], [0.0]]
