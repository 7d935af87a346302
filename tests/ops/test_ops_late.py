"""Weight gradients that come later are those that would have come at once, bit for bit."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.ops.backend import use
from weft.ops.experts import expert_mlp
from weft.ops.late import Late, attach, later, queued
from weft.ops.linear import linear
from weft.ops.mlp import mlp

Operation = Callable[..., Tensor]
SHAPES: dict[str, tuple[Operation, list[tuple[int, ...]]]] = {
    "linear": (linear, [(6, 5)]),
    "mlp": (mlp, [(7, 5), (4, 7)]),
    "experts": (lambda x, u, d: expert_mlp(x, u, d, [4, 0, 5], x.detach().sum(1)), [(3, 6, 5), (3, 5, 6)]),
}


class Weights(nn.Module):
    """An operation with its weights, and the same numbers every time."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.call, shapes = SHAPES[name]
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.own = nn.ParameterList(nn.Parameter(value.to(dtype)) for value in drawn)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, *self.own)


def run(model: Weights, late: Late | None = None, key: object = 0, seed: int = 0) -> Tensor:
    """One forward pass and its backward pass (B alone with ``late``); the input's gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64).to(model.own[0].dtype).requires_grad_()
    loss = model(x).square().sum()
    if late is None:
        loss.backward()
    else:
        with late.defer(key):
            loss.backward()
    return x.grad


def attached(model: nn.Module) -> Late:
    late = Late()
    attach(model, late)
    return late


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_now_and_later_are_the_same_bits(name: str, dtype: torch.dtype) -> None:
    plain, whole, split = (Weights(name, dtype) for _ in range(3))
    attached(whole)
    late = attached(split)
    want = run(plain)
    assert torch.equal(run(whole), want)
    assert torch.equal(run(split, late), want)
    assert all(param.grad is None for param in split.parameters())
    assert len(late) == len(plain.own)
    assert late.keys == (0,)
    late.run(0)
    assert not len(late)
    assert not late.keys
    for a, b, c in zip(plain.own, whole.own, split.own, strict=True):
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a.grad, c.grad)


@pytest.mark.parametrize("name", SHAPES)
def test_microbatches_in_another_order(name: str) -> None:
    plain, split = Weights(name), Weights(name)
    late = attached(split)
    for seed in (2, 0, 1):
        run(plain, seed=seed)
    for seed in range(3):
        run(split, late, ("stage", seed), seed)
    for seed in (2, 0, 1):
        late.run(("stage", seed))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.own, split.own, strict=True))


@pytest.mark.parametrize("frozen", range(2))
@pytest.mark.parametrize("name", ["mlp", "experts"])
def test_frozen_weights_queue_nothing(name: str, frozen: int) -> None:
    plain, split = Weights(name), Weights(name)
    late = attached(split)
    for model in (plain, split):
        model.own[frozen].requires_grad_(False)
    assert torch.equal(run(plain), run(split, late))
    assert len(late) == 1
    late.run(0)
    assert torch.equal(plain.own[1 - frozen].grad, split.own[1 - frozen].grad)
    assert split.own[frozen].grad is None
    split.requires_grad_(False)
    run(split, late)
    assert not len(late)


def test_a_weight_used_three_times_with_recomputation() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float32)
    models = [nn.Linear(5, 5, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    late = attached(models[1])
    for model in models:
        x = start.clone().requires_grad_()
        for _ in range(3):
            x = checkpoint(lambda y, w: linear(y, w).tanh(), x, model.weight, use_reentrant=False)
        with late.defer("B"):
            x.sum().backward()
    assert models[1].weight.grad is None
    assert len(late) == 3
    late.run("B")
    assert torch.equal(models[0].weight.grad, models[1].weight.grad)


def test_hooks_see_what_they_would_have_seen() -> None:
    seen: dict[int, list[Tensor]] = {}

    def hook(param: Tensor) -> None:
        if param.grad is not None:  # autograd calls it in B too, where no gradient has come
            seen.setdefault(id(param), []).append(param.grad)
            param.grad = None  # as a store does that adds up in another dtype

    plain, split = Weights("mlp", torch.bfloat16), Weights("mlp", torch.bfloat16)
    late = attached(split)
    for param in [*plain.own, *split.own]:
        param.register_post_accumulate_grad_hook(hook)
    run(plain)
    run(split, late)
    assert len(seen) == 2
    late.run(0)
    for a, b in zip(plain.own, split.own, strict=True):
        assert [len(seen[id(param)]) for param in (a, b)] == [1, 1]
        assert torch.equal(seen[id(a)][0], seen[id(b)][0])


def test_gradients_add_up_in_place_and_need_no_memory_of_weights() -> None:
    """As at level 0, where ``grad`` is a part of a buffer, and level 3, where parameters are given back."""
    plain, split = Weights("experts"), Weights("experts")
    late = attached(split)
    buffers = [torch.ones_like(param) for param in split.own]
    for param, buffer in zip(split.own, buffers, strict=True):
        param.grad = buffer
    run(plain)
    run(split, late)
    for param in split.own:
        param.untyped_storage().resize_(0)
    late.run(0)
    for param, wanted, buffer in zip(split.own, plain.own, buffers, strict=True):
        assert param.grad is buffer
        torch.testing.assert_close(buffer, wanted.grad + 1, rtol=0, atol=1e-12)


def test_without_memory_of_weights_and_without_a_gradient_so_far() -> None:
    plain, split = Weights("linear"), Weights("linear")
    late = attached(split)
    run(plain)
    run(split, late)
    split.own[0].untyped_storage().resize_(0)
    late.run(0)
    assert torch.equal(split.own[0].grad, plain.own[0].grad)


def test_a_cast_weight_and_the_reference_are_at_once() -> None:
    model = Weights("linear", torch.float32)
    late = attached(model)
    x = torch.randn(3, 5, dtype=torch.float64)
    with late.defer(0):
        linear(x, model.own[0].double()).sum().backward()
    assert not len(late)
    assert model.own[0].grad is not None
    model.zero_grad()
    with use(linear="reference"):
        run(model, late)
    assert not len(late)
    assert model.own[0].grad is not None


def test_only_what_is_needed_stays_alive_and_only_until_it_is_used() -> None:
    model = nn.Linear(5, 5, bias=False)
    late = attached(model)
    x = torch.randn(4, 5, requires_grad=True)
    inner = linear(x, model.weight)
    middle = inner.tanh()
    loss = linear(middle, model.weight).sum()
    with late.defer(0):
        loss.backward()
    kept, dropped = weakref.ref(middle), weakref.ref(inner)
    del inner, middle, loss
    gc.collect()
    assert dropped() is None
    tensors = 4 * 5 * 4  # of 4 x 5 numbers; the loss's gradient is one number, expanded
    assert late.bytes == 3 * tensors + 4
    late.run(0)
    assert kept() is None
    assert late.bytes == 0


def test_attach_and_detach() -> None:
    model = Weights("linear")
    weight = model.own[0]
    assert queued(weight) is None
    late = attached(model)
    assert queued(weight) is weight
    assert queued(weight.t()) is None
    assert not later(weight)
    with late.defer(0):
        assert later(weight)
        with pytest.raises(RuntimeError, match="inside another defer"), late.defer(1):
            pass
    attach(model, None)
    assert queued(weight) is None
    with pytest.raises(KeyError):
        late.run(1)


def test_a_pass_that_fails_leaves_nothing() -> None:
    model = Weights("linear")
    late = attached(model)
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda grad: 1 / 0)  # runs after the gradient of the weight is queued
    with pytest.raises(ZeroDivisionError), late.defer(0):
        model(x).sum().backward()
    assert not len(late)
    assert not late.keys
    run(model, late)
    assert len(late) == 1
    late.forget()
    assert not len(late)
