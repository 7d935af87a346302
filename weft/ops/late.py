"""Gradients of weights, computed later: the B and W of zero-bubble pipelines (arXiv 2401.10241).

A backward pass inside ``Late.defer`` (B) gives the gradients of inputs. What the gradients of large weights
are computed from is kept, and ``Late.run`` (W) computes them and hands them to autograd. Without ``defer``
everything is computed at once. What is queued:

    queued      weights of projections (attention, Mamba, MLP, latent width, MTP's ``eh_proj``, router) and of
                experts
    at once     norms, convolutions, A_log, D, dt_bias, biases, the token table, the head (its gradient is
                formed in the forward pass), a weight that is cast on its way to a product, all of the
                ``reference`` back ends

Autograd runs backward passes, and what they recompute, on threads of its own, and one process may run many
ranks: so an operation finds the queue through the parameter itself, and neither through its thread nor
through the module.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_QUEUE = "late_gradients"  # attribute of a parameter


class _Task(NamedTuple):
    """The gradient of ``weight`` is ``compute(*given)``."""

    weight: Tensor
    compute: Callable[..., Tensor]
    given: tuple[Any, ...]


class Late:
    """Queues of weight gradients, one for each key: a stage and a microbatch."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, list[_Task]] = {}
        self._open: list[_Task] | None = None

    @contextmanager
    def defer(self, key: Hashable) -> Iterator[None]:
        """Queue the weight gradients of the backward passes inside, which run one at a time.

        Hooks on parameters run there too, and find ``grad`` as it was before.

        Raises:
            RuntimeError: another ``defer`` of this object is open.
        """
        if self._open is not None:
            raise RuntimeError(f"defer({key!r}) inside another defer; close that first")
        self._open = self._tasks.setdefault(key, [])
        try:
            yield
        except BaseException:
            self._tasks.pop(key, None)
            raise
        finally:
            self._open = None

    def run(self, key: Hashable) -> None:
        """Compute what is queued, in order, and add it to ``grad``; hooks of the parameters run.

        It is one backward pass: like the one that was split, it adds up the gradients of all uses of a weight
        before it hands them over. It reads no parameter, and calls no collective.

        Raises:
            KeyError: nothing was deferred under this key.
        """
        tasks = self._tasks.pop(key)
        with torch.enable_grad():  # autograd runs the nodes made last first
            ends = [_Landing.apply(task.weight, task) for task in reversed(tasks)]
        tasks.clear()  # each node alone keeps what it needs, until it has run
        if ends:
            torch.autograd.backward(ends)

    def forget(self) -> None:
        """Drop everything queued (after a step that failed)."""
        self._tasks.clear()

    def __len__(self) -> int:
        """Gradients queued."""
        return sum(map(len, self._tasks.values()))

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What was deferred and has not run."""
        return tuple(self._tasks)

    @property
    def bytes(self) -> int:
        """Memory that what is queued keeps alive."""
        given = (value for tasks in self._tasks.values() for task in tasks for value in task.given)
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in given
            if isinstance(value, Tensor)
        }
        return sum(storages.values())

    def add(self, weight: Tensor, compute: Callable[..., Tensor], given: tuple[Any, ...]) -> None:
        """Queue a gradient; only inside ``defer`` (see ``gradient``)."""
        assert self._open is not None  # noqa: S101 - ``later`` was asked
        self._open.append(_Task(weight, compute, given))

    @property
    def deferring(self) -> bool:
        """Whether gradients are being queued now."""
        return self._open is not None


class _Landing(torch.autograd.Function):
    """A node whose backward pass is the gradient of a weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, task: _Task) -> Tensor:
        ctx.task = task
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        task, ctx.task = ctx.task, None
        return task.compute(*task.given), None


def attach(model: nn.Module, late: Late | None) -> None:
    """Have the gradients of a model's weights queued in ``late`` whenever it defers; None: never.

    Args:
        model: all of its parameters, now; between a forward pass and its backward pass nothing may change.
        late: the queue of this rank.
    """
    for param in model.parameters():
        if late is not None:
            setattr(param, _QUEUE, late)
        elif hasattr(param, _QUEUE):
            delattr(param, _QUEUE)


def queued(weight: Tensor) -> Tensor | None:
    """``weight`` if it is a trainable parameter with a queue: what a forward pass keeps for ``gradient``.

    Keep it as an attribute of the autograd context: under recomputation ``saved_tensors`` are copies, and
    their gradients go nowhere.
    """
    return weight if weight.requires_grad and getattr(weight, _QUEUE, None) is not None else None


def later(weight: Tensor | None) -> bool:
    """Whether ``gradient`` of this (``queued`` weight) queues now."""
    return weight is not None and cast(Late, getattr(weight, _QUEUE)).deferring


def gradient(weight: Tensor | None, compute: Callable[..., Tensor], *given: Any) -> Tensor | None:
    """What a backward pass returns for a weight: its gradient, or None if that is queued.

    Args:
        weight: what ``queued`` gave.
        compute: makes the gradient; keeps no tensor alive by itself.
        given: its arguments, kept until then.
    """
    if weight is None or not later(weight):
        return compute(*given)
    cast(Late, getattr(weight, _QUEUE)).add(weight, compute, given)
    return None


def outer(grad: Float[Tensor, "tokens rows"], x: Float[Tensor, "tokens cols"]) -> Float[Tensor, "rows cols"]:
    """Gradient of W in ``x W^T``."""
    return grad.t() @ x
