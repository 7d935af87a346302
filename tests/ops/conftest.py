"""Compares an operation's back ends: outputs and all gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from weft.ops.backend import use


def _run(op: str, backend: str, call: Callable, inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    with use(**{op: backend}):
        outputs = call(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        generator = torch.Generator().manual_seed(seed)
        wanted = [o for o in outputs if o.requires_grad]
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in wanted
        ]
        grads = torch.autograd.grad(wanted, [t for t in leaves if t.requires_grad], cotangents)
    return [*outputs, *grads]


@pytest.fixture
def twins() -> Callable:
    """``twins(op, call, inputs, tolerance)``: fast equals reference, relative to the largest element."""

    def check(op: str, call: Callable, inputs: Sequence[Tensor], tolerance: float, seed: int = 0) -> None:
        slow, fast = (_run(op, name, call, inputs, seed) for name in ("reference", "fast"))
        for want, got in zip(slow, fast, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            scale = want.abs().max().clamp_min(1.0).item() if want.numel() else 1.0
            assert (got - want).abs().max().item() <= tolerance * scale if want.numel() else True

    return check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
