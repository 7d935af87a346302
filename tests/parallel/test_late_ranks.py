"""Backward passes in two halves under layouts: the bits and the collectives of one pass, and W has none."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.test_late_model import is_late
from tests.parallel.equal import CPU, model_of, values_of
from tests.parallel.plans import Case
from tests.tiny import batch, make
from weft.build.model import assemble_from
from weft.models.hybrid import HybridLM
from weft.ops.late import Late, attach
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.ledger import Entry, record
from weft.parallel.mesh import Mesh, mesh_of
from weft.parallel.store import Store
from weft.parallel.threads import run_threads
from weft.plan.box import Box
from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig
from weft.train.objective import count, objective, to_device

PLAIN = Case(
    pp=1,
    kind="1f1b",
    sizes="same",
    cut="even",
    gather="unit",
    resident=False,
    tp=2,
    tp_embed=1,
    dp=1,
    cp=1,
    ep=2,
    etp=1,
    attend="auto",
    scan="auto",
    transport="all_to_all",
    routing="dropless",
    balance="document",
    limited=False,
    jitter=False,
    length=7,
    level=0,
    hybrid=False,
    microbatches=1,
    kv_heads=2,
    groups=2,
    packed=True,
    mtp="repeated",
    tied=False,
    shares="equal",
    recompute=False,
    layer="mlp",
    latent=True,
)
CASES = {
    "tp": PLAIN,
    "tp recomputed": replace(PLAIN, recompute=True, ep=1, etp=2, mtp="none", routing="padded"),
    "tp_embed, without latent": replace(PLAIN, tp=1, tp_embed=2, latent=False, mtp="none"),
    "cp": replace(PLAIN, tp=1, cp=2, layer="out_of_tree", mtp="one", tied=True, transport="per_node"),
}


def build(case: Case, mesh: Mesh) -> HybridLM:
    config = model_of(case)
    values = values_of(config)

    def read(name: str, box: Box) -> Tensor:
        return values[name][box.within(Box.whole(values[name].shape))].clone()

    model = assemble_from(config, "fp64", CPU, read, mesh)
    model.set_recompute(case.recompute)
    return model


def loss(model: HybridLM, case: Case, mesh: Mesh, seed: int) -> Tensor:
    made = batch((5, 1, case.length), seed=mesh.reader + 10 * seed, depths=model.config.depths)
    totals = count([made], SingleComm())
    return objective(model, to_device(made, CPU, mesh), totals, chunk=16, full=made.windows)[0]


def gradients(model: HybridLM) -> dict[str, Tensor]:
    return {name: param.grad for name, param in model.named_parameters()}


def differences(case: Case, comm: Comm) -> list[str]:
    """What differs on this rank between two halves and one pass."""
    mesh = mesh_of(case.plan, comm)
    whole, split = build(case, mesh), build(case, mesh)
    late, noted = Late(), list[list[Entry]]()
    attach(split, late)
    with record(comm) as ledger:
        for made in [loss(whole, case, mesh, seed) for seed in range(2)]:
            made.backward()
    noted.append(ledger.entries)
    with record(comm) as ledger:
        for key, made in enumerate([loss(split, case, mesh, seed) for seed in range(2)]):
            with late.defer(key):
                made.backward()
    noted.append(ledger.entries)
    found = [name for name, grad in gradients(split).items() if (grad is None) != is_late(name)]
    with record(comm) as ledger:
        late.run(1)
        late.run(0)
    found += ["W has collectives"] * bool(ledger.entries) + ["B has others"] * (noted[0] != noted[1])
    want = gradients(whole)
    for name, grad in gradients(split).items():
        same = grad is not None and torch.equal(grad, want[name])  # two summands commute
        found += [] if same else [f"gradient of {name}"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_halves_are_one_pass(name: str) -> None:
    case = CASES[name]
    found = run_threads(case.ranks, lambda comm: differences(case, comm))
    assert not any(found), found


def reduced(comm: Comm, level: int, precision: str, split: bool) -> list[Tensor]:
    """Gradients of two microbatches in flight, as the optimizer sees them."""
    layout = LayoutConfig(dp=comm.size, store=StoreConfig(level=level))
    mesh = mesh_of(PlanConfig(decoder=layout), comm)
    model, late = make(precision, pattern="ME*-", mtp_num_depths=0), Late()
    store = Store(model, model.config.params(), precision, mesh)
    if split:
        attach(model, late)
    store.zero_grad()
    batches = [batch((11, 7), seed=10 * comm.rank + i, depths=0) for i in range(2)]
    totals, made = count(batches, comm), list[Tensor]()
    for key, one in enumerate(batches):
        store.enter(key)
        made.append(objective(model, to_device(one), totals, chunk=16)[0])
    for key, value in enumerate(made):
        store.enter(key, late=split)
        with late.defer(key):
            value.backward()
        late.run(key)
        store.end_pass(key)
    store.reduce()
    return [flat.grad.clone() for flat in store.flats]


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("level", range(4))
def test_stores_get_the_same_bits(level: int, precision: str) -> None:
    whole, split = (
        run_threads(2, lambda comm, split=split: reduced(comm, level, precision, split))
        for split in (False, True)
    )
    for want, got in zip(whole, split, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
