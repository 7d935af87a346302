"""The decoder's input is put together on each rank for its own tokens: no rank ever holds the whole."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel.live import Allocations
from tests.parallel.mixed import DENSE, VISION
from weft.nn.linear import Embedding
from weft.ops.rows import written
from weft.parallel.border import Border
from weft.parallel.comm import Comm
from weft.parallel.fill import fill
from weft.parallel.mesh import Mesh
from weft.parallel.threads import run_threads
from weft.plan.boundary import Group, Table
from weft.plan.items import Item, Placed
from weft.plan.plans import plans_of
from weft.plan.runs import Run
from weft.spec.hybrid import EmbeddingConfig
from weft.spec.layout import LayoutConfig, PlanConfig
from weft.spec.modules import Modules

TOKENS, WIDTH, MEDIA, VOCAB = 65536, 64, 0.75, 61
LAYOUTS = {
    "tp4": LayoutConfig(tp=4),
    "tp2 cp2": LayoutConfig(tp=2, cp=2),
    "cp4": LayoutConfig(cp=4),
    "tp2 tp_embed2": LayoutConfig(tp=2, tp_embed=2),
}


class Peak(TorchDispatchMode):
    """Most bytes that lived at a time, of what operations inside made."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._known = 0, Allocations()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = self._known.__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, sum(self._known.sizes()))
        return out


def table() -> Table:
    """One sample: four pictures of many blocks, and text between them."""
    rows = int(TOKENS * MEDIA) // 4
    step = TOKENS // 4
    items = tuple(
        Placed(Item("vision", ((1, 2 * rows, 2),), rows, (i,)), (Run(i * step + 100, rows),))
        for i in range(4)
    )
    return Table((TOKENS,), items)


def ids(places: tuple[Placed, ...]) -> Tensor:
    found = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, TOKENS))
    for placed in places:
        for run in placed.places:
            found[run.start : run.stop] = -1
    return found


def encoded(first: int, count: int) -> Tensor:
    """Rows of items, by number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None] * torch.linspace(0.5, 1.5, WIDTH)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_more_than_a_share_of_the_whole(name: str) -> None:
    modules = Modules(DENSE, {"vision": VISION})
    plan = PlanConfig(decoder=LAYOUTS[name], encoders={"vision": LayoutConfig(dp=4)})
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))
    plans, known = plans_of(plan, 4, modules), table()

    def work(comm: Comm) -> tuple[int, Tensor]:
        mesh = Mesh(plans.decoder, comm)
        layer = Embedding(EmbeddingConfig(vocab=VOCAB, embed=WIDTH, std=1.0))
        (spec,) = EmbeddingConfig(vocab=VOCAB, embed=WIDTH, std=1.0).params()
        model = torch.nn.Module()
        model.embed = layer
        spec = spec.under("embed")
        box = mesh.held(spec)[0].box
        layer.weight = torch.nn.Parameter(
            weight[box.start[0] : box.stop[0], box.start[1] : box.stop[1]].clone()
        )
        fill(model, [spec], mesh)
        group = Group(plans, "vision", VISION, [known])
        border = Border(plans, "vision", WIDTH, comm, torch.float32, torch.device("cpu"))
        own = group._held
        mine = [
            encoded(int(f), int(n)) for r, f, n in zip(own[0], own[2], own[3], strict=True) if r == comm.rank
        ]
        rows = torch.cat([torch.zeros(0, WIDTH), *mine])
        here = ids(known.items).split(mesh.layout.tokens(TOKENS))[mesh.part]
        with Peak() as peak, torch.no_grad():
            wait = border.forward(group.route(0), rows)
            x = layer(here)
            came = wait()
            assert came is not None
            runs = group.wanted(comm.rank, 0)
            at = torch.cat([torch.arange(run.start, run.stop) for run in runs] or [torch.zeros(0).long()])
            x = written(x, came, at)
        return peak.most, x

    found = run_threads(4, work, 60)
    with Peak() as peak, torch.no_grad():  # the whole sequence on one rank, as masked_scatter has it
        known_ids = ids(known.items)
        media = encoded(0, int(TOKENS * MEDIA))
        text = F.embedding(known_ids.clamp_min(0), weight)
        whole = text.masked_scatter((known_ids < 0).unsqueeze(1).expand_as(text), media)
    most = max(size for size, _ in found)
    limit = 1.4 if "embed" in name else 1.25  # rows of cut features are copied once more where they are made
    assert most <= limit / 4 * peak.most, (most / peak.most, name)
    total = sum(x.double().sum().item() for _, x in found)
    assert total == pytest.approx(whole.double().sum().item(), rel=1e-6)
