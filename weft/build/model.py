"""From a config to a model with memory, dtypes and values."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from weft.build.init import initial
from weft.models.hybrid import HybridLM
from weft.spec.hybrid import HybridConfig
from weft.spec.param import ParamSpec
from weft.spec.precision import PRECISIONS, Precision


def dtype_of(spec: ParamSpec, precision: Precision) -> torch.dtype:
    """The torch dtype of one parameter under a policy."""
    return getattr(torch, precision.of(spec.fp32))


def assemble(config: HybridConfig, precision: str, device: torch.device, seed: int) -> HybridLM:
    """A freshly initialized model."""
    policy = PRECISIONS[precision]
    return _materialize(config, device, lambda spec: initial(spec, seed, dtype_of(spec, policy)))


def assemble_from(
    config: HybridConfig, precision: str, device: torch.device, tensors: Callable[[str], Tensor]
) -> HybridLM:
    """A model whose values come by name, cast to the policy's dtypes."""
    policy = PRECISIONS[precision]
    return _materialize(config, device, lambda spec: tensors(spec.name).to(dtype_of(spec, policy)))


def _materialize(
    config: HybridConfig, device: torch.device, values: Callable[[ParamSpec], Tensor]
) -> HybridLM:
    model = HybridLM(config)
    for spec in config.params():
        place, name = _place(model, spec.name)
        value = values(spec).to(device)
        if spec.buffer:
            place.register_buffer(name, value)
        else:
            setattr(place, name, nn.Parameter(value))
    if config.tie_word_embeddings:
        model.head.weight = model.embed.weight
    return model


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def tensors(model: nn.Module, config: HybridConfig) -> Mapping[str, Tensor]:
    """The live tensors of a model by spec name: what a checkpoint holds."""
    found: dict[str, Tensor] = {}
    for spec in config.params():
        place, name = _place(model, spec.name)
        found[spec.name] = getattr(place, name).detach()
    return found
