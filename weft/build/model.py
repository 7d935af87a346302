"""From a config to a model with memory, dtypes and values."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from weft.build.init import initial
from weft.models.audio import AudioEncoder
from weft.models.encoder import whole
from weft.models.hybrid import HybridLM
from weft.models.vision import VisionEncoder
from weft.nn.encoder import Projector
from weft.parallel.fill import fill
from weft.parallel.mesh import Mesh
from weft.plan.box import Box
from weft.spec.audio import AudioConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.modules import DECODER, Module
from weft.spec.param import ParamSpec
from weft.spec.precision import PRECISIONS, Precision
from weft.spec.vision import VisionConfig

Model = HybridLM | VisionEncoder | AudioEncoder


def dtype_of(spec: ParamSpec, precision: Precision) -> torch.dtype:
    """The torch dtype of one parameter under a policy."""
    return getattr(torch, precision.of(spec.fp32))


def assemble(
    config: HybridConfig, precision: str, device: torch.device, seed: int, mesh: Mesh | None = None
) -> HybridLM:
    """A freshly initialized decoder: all of it, or with a mesh what this rank holds."""
    model = assemble_module(Module(DECODER, config), precision, device, drawn(seed), mesh)
    assert isinstance(model, HybridLM)  # noqa: S101 - what a decoder's config makes
    return model


def assemble_from(
    config: HybridConfig,
    precision: str,
    device: torch.device,
    read: Callable[[str, Box], Tensor],
    mesh: Mesh | None = None,
) -> HybridLM:
    """A decoder whose values come by name and box, cast to the policy's dtypes."""
    model = assemble_module(Module(DECODER, config), precision, device, taken(read), mesh)
    assert isinstance(model, HybridLM)  # noqa: S101 - what a decoder's config makes
    return model


Values = Callable[[ParamSpec, Box, torch.dtype], Tensor]
"""A box of a parameter, named as in checkpoints, in some dtype."""


def drawn(seed: int) -> Values:
    """Initial values."""
    return lambda spec, box, dtype: initial(spec, seed, dtype, box)


def taken(read: Callable[[str, Box], Tensor]) -> Values:
    """Values that come by name and box."""
    return lambda spec, box, dtype: read(spec.name, box).to(dtype)


def assemble_module(
    module: Module, precision: str, device: torch.device, values: Values, mesh: Mesh | None = None
) -> Model:
    """A module of a run, or with a mesh what this rank holds; what is not trained requires no gradient."""
    policy = PRECISIONS[precision]

    def value(spec: ParamSpec, box: Box) -> Tensor:
        return values(replace(spec, name=module.full(spec.name)), box, dtype_of(spec, policy))

    return _materialize(module, device, value, mesh)


def _made(module: Module, mesh: Mesh | None) -> Model:
    """On the meta device."""
    local = mesh.localize if mesh else whole

    def has(unit: str) -> bool:
        elsewhere = bool(module.moved) and unit == "projector"
        return not elsewhere and (mesh is None or mesh.has(unit))

    match module.config:
        case VisionConfig():
            return VisionEncoder(module.config, local, has)
        case AudioConfig():
            return AudioEncoder(module.config, local, has)
        case HybridConfig():
            model = HybridLM(module.config, local, has)
            if has("projectors"):
                model.projectors.update({n: Projector(one.projector) for n, one in module.moved.items()})
            return model
        case _:
            raise TypeError(f"no model is made from a {type(module.config).__name__}")


def _materialize(
    module: Module, device: torch.device, values: Callable[[ParamSpec, Box], Tensor], mesh: Mesh | None
) -> Model:
    model = _made(module, mesh)
    specs = [spec for spec in module.params if mesh is None or mesh.has(spec.name)]
    for spec in specs:
        place, name = _place(model, spec.name)
        value = (_local(spec, values, mesh) if mesh else values(spec, Box.whole(spec.shape))).to(device)
        if spec.buffer:
            place.register_buffer(name, value)
        else:
            setattr(place, name, nn.Parameter(value, requires_grad=module.trains(spec.name)))
    if isinstance(model, HybridLM) and model.config.tie_word_embeddings and "head" in model.units():
        model.head.weight = model.embed.weight
    if mesh:
        fill(model, specs, mesh)
        model.rows = mesh.rows  # pyright: ignore[reportArgumentType] - a function, which modules keep too
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
