"""Layers whose parameters are exactly those that their config lists."""

import torch
from torch import Tensor, nn

from weft.spec.param import ParamSpec


class Part(nn.Module):
    """A named part of a layer that only holds tensors, those that its specs list."""

    weight: Tensor
    bias: Tensor
    up_proj: Tensor
    down_proj: Tensor


class Layer(nn.Module):
    """A module built from a config: ``params()`` says which tensors it holds.

    Tensors start on the meta device; ``build`` gives them memory, dtype and values, each by its
    spec, so that nothing about precision, layout or initialization is said twice.
    """

    def own(self, specs: tuple[ParamSpec, ...]) -> None:
        """Register every listed tensor that a child layer does not already hold."""
        for spec in specs:
            *path, name = spec.name.split(".")
            place: nn.Module = self
            for step in path:
                if step not in place._modules:
                    place.add_module(step, Part())
                place = place.get_submodule(step)
            if name in place._parameters or name in place._buffers:
                continue
            tensor = torch.empty(spec.shape, device="meta")
            if spec.buffer:
                place.register_buffer(name, tensor)
            else:
                place.register_parameter(name, nn.Parameter(tensor))
