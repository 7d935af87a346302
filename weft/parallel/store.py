"""How parameters rest: flat buffers that the optimizer, the gradient sum and the norm work on.

One buffer per (dtype, weight decay). Parameters are views into it, so one fused optimizer call,
one all-reduce and one norm serve the whole model. Under bf16 a float32 master copy rests beside
the parameters, and gradients add up in float32.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.parallel.comm import Comm
from weft.spec.param import ParamSpec
from weft.spec.precision import PRECISIONS


@dataclass
class Flat:
    """Parameters that rest together.

    Attributes:
        specs: their specs, in buffer order.
        compute: what layers read (parameters are views into it).
        master: what the optimizer writes; the same memory where the dtypes are the same.
        grad: summed gradients.
        decay: whether weight decay applies.
    """

    specs: list[ParamSpec]
    compute: Tensor
    master: Tensor
    grad: Tensor
    decay: bool

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of a tensor shaped like this buffer, by name."""
        parts = flat.split([spec.numel for spec in self.specs])
        return {spec.name: part.view(spec.shape) for spec, part in zip(self.specs, parts, strict=True)}


class Store:
    """All trainable parameters of a model, flat."""

    def __init__(self, model: nn.Module, specs: Iterable[ParamSpec], precision: str) -> None:
        policy = PRECISIONS[precision]
        self.master_dtype: torch.dtype = getattr(torch, policy.master)
        params = {spec.name: (spec, model.get_parameter(spec.name)) for spec in specs if not spec.buffer}
        groups: dict[tuple[bool, torch.dtype], list[ParamSpec]] = {}
        for spec, param in params.values():
            groups.setdefault((spec.decay, param.dtype), []).append(spec)
        self.flats = [self._flatten(members, params, decay) for (decay, _), members in groups.items()]

    def _flatten(
        self, specs: list[ParamSpec], params: dict[str, tuple[ParamSpec, nn.Parameter]], decay: bool
    ) -> Flat:
        tensors = [params[spec.name][1] for spec in specs]
        compute = torch.cat([tensor.detach().flatten() for tensor in tensors])
        same = compute.dtype == self.master_dtype
        master = compute if same else compute.to(self.master_dtype)
        flat = Flat(specs, compute, master, torch.zeros_like(master), decay)
        values, grads = flat.views(compute), flat.views(flat.grad)
        for spec, tensor in zip(specs, tensors, strict=True):
            tensor.data = values[spec.name]
            if same:
                tensor.grad = grads[spec.name]  # autograd adds into it in place
            else:
                tensor.register_post_accumulate_grad_hook(_adder(grads[spec.name]))
        return flat

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for flat in self.flats:
            flat.grad.zero_()

    def reduce(self, comm: Comm) -> None:
        """Sum gradients over ranks."""
        if comm.size > 1:
            for flat in self.flats:
                comm.all_reduce(flat.grad)

    def norm(self) -> Tensor:
        """Global L2 norm of the gradient."""
        return torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(flat.grad) for flat in self.flats])
        )

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradient."""
        for flat in self.flats:
            flat.grad.mul_(factor)

    def adopt(self) -> None:
        """Copy what layers read to master values, where the two differ."""
        for flat in self.flats:
            if flat.master is not flat.compute:
                flat.master.copy_(flat.compute)

    def publish(self) -> None:
        """Copy master values to what layers read, where the two differ."""
        for flat in self.flats:
            if flat.master is not flat.compute:
                flat.compute.copy_(flat.master)


def _adder(total: Tensor):  # noqa: ANN202 - the hook type torch expects
    def add(param: Tensor) -> None:
        if param.grad is not None:
            total.add_(param.grad)
            param.grad = None

    return add
