"""Bytes of a plan: exact where they rest, against an assembled model; activations against autograd."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tiny import CONFIG, batch
from weft.build.model import assemble
from weft.config.load import from_dict
from weft.ops.segments import Segments
from weft.parallel.comm import Comm
from weft.parallel.mesh import mesh_of
from weft.parallel.store import Store
from weft.parallel.threads import run_threads
from weft.plan.layout import Plan, plan_of_run
from weft.plan.memory import largest, memory
from weft.plan.units import units
from weft.recipes.nemotron import nemotron3_ultra_pretrain
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.count import count, state_bytes
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig


def run_of(precision: str = "bf16", seq_length: int = 64, **plan: Any) -> RunConfig:
    base = stdlib_lm()
    return replace(
        base,
        model=CONFIG,
        data=replace(base.data, seq_length=seq_length),
        train=replace(base.train, precision=precision, micro_batch_size=1),
        plan=from_dict(PlanConfig, plan),
    )


def planned(run: RunConfig, world: int) -> Plan:
    return plan_of_run(run, world)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_one_rank_holds_what_an_assembled_model_holds(precision: str) -> None:
    run = run_of(precision)
    need = memory(run, planned(run, 1), 0)
    assert need.state == state_bytes(run.model, precision)
    model = assemble(run.model, precision, torch.device("cpu"), seed=0)
    assert need.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert need.gathered == 0


@pytest.mark.parametrize("tied", [False, True])
def test_units_are_the_whole_model(tied: bool) -> None:
    for model in (replace(CONFIG, tie_word_embeddings=tied), nemotron3_ultra_pretrain().model):
        found = sum(len(unit.names) * spec.numel for unit in units(model) for spec in unit.specs)
        assert found == count(model).total
    names = {f"{name}.{spec.name}" for unit in units(CONFIG) for name in unit.names for spec in unit.specs}
    assert names == {spec.name for spec in CONFIG.params()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_what_a_store_really_holds(level: int, precision: str) -> None:
    """But for the elements that align its buffers."""
    wide = replace(CONFIG, hidden_size=64, head_dim=32, vocab_size=1021, moe_intermediate_size=64)
    run = run_of(precision, decoder={"tp": 2, "store": {"level": level}})
    run = replace(run, model=wide)

    def held(comm: Comm) -> tuple[int, int, int]:
        mesh = mesh_of(run.plan, comm)
        model = assemble(wide, precision, torch.device("cpu"), 0, mesh)
        flats = Store(model, wide.params(), precision, mesh).flats
        parts = [tensor for flat in flats for s in flat.sections for tensor in (s.compute, s.total)]
        parts += [tensor for flat in flats for tensor in (flat.shard, flat.master, flat.grad)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}
        moments = sum(2 * flat.master.nbytes for flat in flats)
        return sum(storages.values()), moments, sum(buffer.nbytes for buffer in model.buffers())

    need = memory(run, planned(run, 4), 0)
    rests, moments, buffers = run_threads(4, held)[0]
    assert need.moments == pytest.approx(moments, rel=0.01)
    assert need.state == pytest.approx(rests + moments + buffers, rel=0.01)


@pytest.mark.parametrize("decoder", [{"tp": 2}, {"tp": 2, "tp_embed": 2}, {"tp": 4}, {"tp": 2, "pp": 2}])
def test_the_first_rank_of_a_stage_needs_most(decoder: dict[str, Any]) -> None:
    run = run_of(decoder=decoder | {"store": {"level": 1}})
    plan = planned(run, 8)
    assert largest(run, plan)[1].total == max(memory(run, plan, rank).total for rank in range(8))


def test_stages_and_experts_together_hold_the_model_once_per_copy() -> None:
    run = run_of("fp32", decoder={"pp": 2}, experts={"ep": 2, "etp": 2})
    plan = planned(run, 8)
    experts = sum(math.prod(s.shape) for s in CONFIG.params() if "experts" in s.name)
    table = CONFIG.vocab_size * CONFIG.hidden_size  # MTP reads it on the last pipeline rank
    held = sum(memory(run, plan, rank).weights for rank in range(8))
    assert held == 4 * (experts * 1 + (count(CONFIG).total - experts + table) * 4)


@pytest.mark.parametrize("seq_length", [128, 512])
def test_activations_are_of_the_size_that_autograd_keeps(seq_length: int) -> None:
    run = run_of("fp32", seq_length)
    model = assemble(run.model, "fp32", torch.device("cpu"), seed=0)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = batch((seq_length,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model.losses(
            torch.from_numpy(packed.tokens),
            torch.from_numpy(packed.future),
            torch.from_numpy(packed.mask),
            model.context(Segments(packed.lengths)),
            [1.0] * 3,
        )
    assert losses.lm.requires_grad
    estimate = memory(run, planned(run, 1), 0).activations
    assert 0.5 < estimate / sum(kept.values()) < 2
