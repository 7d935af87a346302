"""The sound encoder under layouts: ranks that share heads, channels and clips equal one."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_audio import context, data, everything, make
from weft.build.model import assemble_module, taken
from weft.models.audio import AudioEncoder
from weft.models.presets import PARAKEET_OMNI_TINY
from weft.parallel.comm import Comm
from weft.parallel.mesh import Mesh
from weft.parallel.threads import run_threads
from weft.plan.box import Box
from weft.plan.items import Pieces
from weft.plan.layout import plan_of_encoder
from weft.spec.audio import ConvNorm
from weft.spec.layout import LayoutConfig
from weft.spec.modules import Module


@pytest.mark.parametrize("norm", ["batch", "rms"])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 3), (2, 2), (4, 1)])
def test_ranks_equal_one(tp: int, cp: int, norm: ConvNorm) -> None:
    config = replace(PARAKEET_OMNI_TINY, conv_norm=norm, attention_bias=True)
    one, whole = make(config), everything(config)
    values = {f"sound.{name}": t.detach() for name, t in one.state_dict().items()}
    wanted = one(data(config, whole), context(whole))
    factor = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=wanted.dtype)
    (wanted * factor).sum().backward()
    cuts = [whole.rows * i // cp for i in range(cp + 1)]
    dealt = tuple(whole.part(range(first, last)) for first, last in pairwise(cuts))

    def read(name: str, box: Box) -> Tensor:
        return values[name][box.within(Box.whole(values[name].shape))].clone()

    def work(comm: Comm) -> list[tuple[str, Box, Tensor]]:
        mesh = Mesh(plan_of_encoder(LayoutConfig(tp=tp, cp=cp), comm.size, len(config.blocks)), comm)
        model: Any = assemble_module(Module("sound", config), "fp64", torch.device("cpu"), taken(read), mesh)
        assert isinstance(model, AudioEncoder)
        pieces = Pieces(whole.sizes, dealt, mesh.part)
        ctx = model.context(pieces)
        part = range(pieces.rows)[ctx.rows]
        own = slice(cuts[mesh.part] + part.start, cuts[mesh.part] + part.stop)
        y = model(data(config, pieces, part), ctx)
        torch.testing.assert_close(y, wanted[own].detach(), rtol=1e-10, atol=1e-10)
        (y * factor[own]).sum().backward()
        found: list[tuple[str, Box, Tensor]] = []
        for spec in (spec for spec in config.params() if not spec.buffer):
            grad = model.get_parameter(spec.name).grad
            assert grad is not None
            boxes = mesh.held(spec)
            found += [(spec.name, b.box, grad[b.local.within(Box.whole(grad.shape))]) for b in boxes]
        return found

    totals = {name: torch.zeros_like(p) for name, p in one.named_parameters()}
    for found in run_threads(tp * cp, work):
        for name, box, grad in found:
            totals[name].data[box.within(Box.whole(totals[name].shape))] += grad
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(totals[name], parameter.grad, rtol=1e-10, atol=1e-10)
