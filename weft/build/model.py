"""From a config to a model with memory, dtypes and values."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from weft.build.init import initial
from weft.models.hybrid import HybridLM
from weft.parallel.fill import fill
from weft.parallel.mesh import Mesh
from weft.plan.box import Box
from weft.spec.hybrid import HybridConfig
from weft.spec.param import ParamSpec
from weft.spec.precision import PRECISIONS, Precision


def dtype_of(spec: ParamSpec, precision: Precision) -> torch.dtype:
    """The torch dtype of one parameter under a policy."""
    return getattr(torch, precision.of(spec.fp32))


def assemble(
    config: HybridConfig, precision: str, device: torch.device, seed: int, mesh: Mesh | None = None
) -> HybridLM:
    """A freshly initialized model: all of it, or with a mesh what this rank holds."""
    policy = PRECISIONS[precision]
    return _materialize(
        config, device, lambda spec, box: initial(spec, seed, dtype_of(spec, policy), box), mesh
    )


def assemble_from(
    config: HybridConfig,
    precision: str,
    device: torch.device,
    read: Callable[[str, Box], Tensor],
    mesh: Mesh | None = None,
) -> HybridLM:
    """A model whose values come by name and box, cast to the policy's dtypes."""
    policy = PRECISIONS[precision]
    return _materialize(
        config, device, lambda spec, box: read(spec.name, box).to(dtype_of(spec, policy)), mesh
    )


def _materialize(
    config: HybridConfig,
    device: torch.device,
    values: Callable[[ParamSpec, Box], Tensor],
    mesh: Mesh | None,
) -> HybridLM:
    model = HybridLM(config, mesh.localize, mesh.has) if mesh else HybridLM(config)
    specs = [spec for spec in config.params() if mesh is None or mesh.has(spec.name)]
    for spec in specs:
        place, name = _place(model, spec.name)
        value = (_local(spec, values, mesh) if mesh else values(spec, Box.whole(spec.shape))).to(device)
        if spec.buffer:
            place.register_buffer(name, value)
        else:
            setattr(place, name, nn.Parameter(value))
    if config.tie_word_embeddings and "head" in model.units():
        model.head.weight = model.embed.weight
    if mesh:
        fill(model, specs, mesh)
        model.rows = mesh.rows
    return model


def _local(spec: ParamSpec, values: Callable[[ParamSpec, Box], Tensor], mesh: Mesh) -> Tensor:
    """The tensor of this rank, box by box."""
    boxes = [(held, values(spec, held.box)) for held in mesh.held(spec)]
    if len(boxes) == 1:
        return boxes[0][1]
    local = boxes[0][1].new_empty(mesh.shape(spec))
    for held, value in boxes:
        local[held.local.within(Box.whole(local.shape))] = value
    return local


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def tensors(model: nn.Module, config: HybridConfig, mesh: Mesh | None = None) -> Mapping[str, Tensor]:
    """The live tensors of a model by spec name: what a checkpoint holds; with a mesh what this rank holds."""
    found: dict[str, Tensor] = {}
    for spec in (spec for spec in config.params() if mesh is None or mesh.has(spec.name)):
        place, name = _place(model, spec.name)
        found[spec.name] = getattr(place, name).detach()
    return found
