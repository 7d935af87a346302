"""Which allocations live after each action of an executor, as the allocator of tensors sees them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weft.ops.late import gradient, queued
from weft.parallel.executor import Executor
from weft.plan.schedule import Action


class Allocations(TorchDispatchMode):
    """Sizes in bytes of all storages that operations of this thread made; what OUT makes lies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Action | None = None
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                made = leaf.untyped_storage()
                on_host = self.now is not None and self.now.op == "OUT"
                if made._cdata not in known and not on_host:
                    self._made[made._cdata] = StorageWeakRef(made), made.nbytes()
        return out

    def sizes(self) -> list[int]:
        """Of those on the device that have not been freed."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return [size for _, size in self._made.values()]


@contextmanager
def watched(made: Executor, after: Callable[[Action, list[int]], None]) -> Iterator[Allocations]:
    """``after`` is called when an action is over, with sizes of what lives then on the device."""
    with Allocations() as counter:

        def around(do: Callable[[Action], None]) -> Callable[[Action], None]:
            def run(action: Action) -> None:
                counter.now = action
                do(action)
                after(action, counter.sizes())

            return run

        plain = dict(made._do)
        made._do = {op: around(do) for op, do in plain.items()}
        try:
            yield counter
        finally:
            made._do = plain


def kept(actions: tuple[Action, ...]) -> list[set[tuple[str, int]]]:
    """Stage and microbatch of the forward passes that are kept, after each action of a list."""
    live: set[tuple[str, int]] = set()
    found = []
    for made in actions:
        if made.op in ("F", "IN"):
            live.add(made[1:3])
        elif made.op in ("W", "OUT"):
            live.remove(made[1:3])
        found.append(set(live))
    return found


class Mark(torch.autograd.Function):
    """The identity, which keeps ``marker`` for its backward pass and for the gradient of a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, marker: Tensor) -> Tensor:
        ctx.save_for_backward(marker)
        ctx.weight = queued(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (marker,) = ctx.saved_tensors
        return grad, gradient(ctx.weight, lambda given: given[:1].expand(4), marker), None
