"""Rows written in place: the values and gradients of a copy, in the memory that was there."""

import torch

from weft.ops.rows import written


def test_equals_a_copy() -> None:
    torch.manual_seed(0)
    x, rows, weight = torch.randn(9, 4), torch.randn(3, 4), torch.randn(9, 4)
    at = torch.tensor([7, 0, 3])
    grads = []
    for write in (lambda a, b: written(a, b, at), lambda a, b: a.index_copy(0, at, b)):
        a, b = (t.double().requires_grad_() for t in (x, rows))
        made = write(a * 2.0, b.sin())
        (made * weight).sum().backward()
        grads.append((made.detach(), a.grad, b.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_makes_no_second_tensor() -> None:
    x = torch.randn(5, 2)
    assert written(x, torch.zeros(1, 2), torch.tensor([2])).data_ptr() == x.data_ptr()
    assert written(x, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (5, 2)
