"""Units: the modules on which parameters rest and move together, and what happens around each use of one."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@runtime_checkable
class Divided(Protocol):
    """A model that says on which modules its parameters rest and move together."""

    def units(self) -> dict[str, nn.Module]:
        """Modules by name, in the order of use; a parameter belongs to the deepest one that contains it."""
        ...


@runtime_checkable
class Actions(Protocol):
    """What is done around a use of a unit."""

    def gather(self, unit: str, learn: bool = True) -> None:
        """The unit's parameters are needed; ``learn``: the same use comes again with the next microbatch."""
        ...

    def free(self, unit: str) -> None:
        """They are needed no longer."""
        ...

    def begin(self, unit: str) -> Hashable:
        """A use begins that will give gradients; in which pass."""
        ...

    def finish(self, unit: str, key: Hashable) -> None:
        """The backward pass of a use is over."""
        ...


def unit_of(path: str, units: Iterable[str]) -> str:
    """The deepest unit that contains the parameter at ``path``; the unit named ``""`` contains all.

    Raises:
        ValueError: none does.
    """
    around = [unit for unit in units if not unit or path.startswith(f"{unit}.")]
    if not around:
        raise ValueError(f"parameter {path!r} lies in none of the units {list(units)}")
    return max(around, key=len)


def watch(model: nn.Module, units: Mapping[str, nn.Module], owners: Mapping[int, str], do: Actions) -> None:
    """Have ``do`` called around each use of a unit by a module.

    Args:
        model: the whole.
        units: modules by name.
        owners: the unit of each parameter, by ``id``; a tied weight is used by two modules and has one.
        do: the actions.
    """
    used: dict[str, dict[str, None]] = {}
    for path, param in model.named_parameters(remove_duplicate=False):
        if id(param) in owners:
            used.setdefault(unit_of(path, units), {})[owners[id(param)]] = None
    for name, needs in used.items():
        _Around(units[name], tuple(needs), do)


class _Around:
    """Hooks of one module.

    Two identity functions stand in the autograd graph. The backward pass runs nodes in the reverse order of
    their creation, so the one on the outputs runs before, and the one on the inputs after, everything that
    the module created in between, be its results outputs or statistics.
    """

    def __init__(self, module: nn.Module, needs: tuple[str, ...], do: Actions) -> None:
        self.needs, self.do = needs, do
        self.again = getattr(module, "needs_weight_in_backward", True)
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        training = torch.is_grad_enabled()
        for unit in self.needs:
            self.do.gather(unit, learn=training)
        if not training:
            return args, kwargs
        keys = [self.do.begin(unit) for unit in self.needs]
        return _mark((args, kwargs), lambda: self.finished(keys))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for unit in self.needs:
            self.do.free(unit)
        return _mark(output, self.resumed) if self.again and torch.is_grad_enabled() else output

    def resumed(self) -> None:
        for unit in self.needs:
            self.do.gather(unit)

    def finished(self, keys: Sequence[Hashable]) -> None:
        for unit, key in zip(self.needs, keys, strict=True):
            if self.again:
                self.do.free(unit)
            self.do.finish(unit, key)


class _Mark(torch.autograd.Function):
    """The identity; ``reached`` is called when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.reached()
        return None, *grads


def _mark(value: Any, reached: Callable[[], None]) -> Any:
    """The same value, with all its tensors that require gradients behind one mark."""
    tensors = list(_tensors(value))
    return _replaced(value, deque(_Mark.apply(reached, *tensors))) if tensors else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)
    elif type(value) is dict:
        yield from _tensors(list(value.values()))


def _replaced(value: Any, tensors: deque[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return tensors.popleft() if value.requires_grad else value
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, tensors) for key, item in value.items()}
    return value


class Foresight:
    """Which units come next, as in the step before.

    Args:
        ahead: how many to tell of.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._known: list[str] = []
        self._seen: list[str] = []
        self._at = 0

    def use(self, unit: str, learn: bool) -> tuple[str, ...]:
        """The units that come after this use of ``unit``; a use that is not as before is looked up."""
        if learn:
            self._seen.append(unit)
        if self._known[self._at : self._at + 1] != [unit]:
            self._at = self._known.index(unit) if unit in self._known else len(self._known)
        self._at += 1
        return tuple(self._known[self._at : self._at + self._ahead])

    def end(self) -> None:
        """The step is over."""
        self._known, self._seen, self._at = self._seen or self._known, [], 0
