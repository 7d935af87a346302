"""Many steps: fp64 stays within rounding of one process, fp32 until the first routing flip."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parallel.equal import Samples
from tests.tiny import CONFIG
from weft.build.model import assemble
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.mesh import mesh_of
from weft.parallel.threads import run_threads
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig
from weft.spec.run import OptimizerConfig, RunConfig, SchedulerConfig, TrainConfig
from weft.train.loop import Trainer

MODEL = replace(CONFIG, initializer_range=0.05)
SHORT = replace(MODEL, pattern="M*E", mtp_num_depths=0)
PLANS = {
    "tp 2, dp 2, level 3": LayoutConfig(tp=2, dp=2, store=StoreConfig(level=3)),
    "3-D, level 1": LayoutConfig(tp=2, tp_embed=2, store=StoreConfig(level=1)),
    "dp 4, hybrid level 2": LayoutConfig(dp=4, store=StoreConfig(level=2, shards=2)),
}


def rows(
    config: HybridConfig, plan: PlanConfig, comm: Comm, precision: str, steps: int
) -> list[dict[str, Any]]:
    train = TrainConfig(
        train_iters=steps, global_batch_size=4, micro_batch_size=2, precision=precision, loss_chunk=16
    )
    run = RunConfig(
        model=config,
        train=train,
        plan=plan,
        optimizer=OptimizerConfig(lr=3e-3),
        scheduler=SchedulerConfig(lr_decay_style="constant", lr_warmup_iters=5),
    )
    mesh = mesh_of(plan, comm)
    model = assemble(config, precision, torch.device("cpu"), 5, mesh)
    trainer = Trainer(run, model, Samples(packed=True, depths=config.depths), mesh)
    return [trainer.step(i, trainer.batches(4 * ((i - 1) % 8))) for i in range(1, steps + 1)]


def both(
    config: HybridConfig, layout: LayoutConfig, precision: str, steps: int
) -> tuple[list[dict], list[dict]]:
    plan = PlanConfig(decoder=layout)
    ranks = run_threads(4, lambda comm: rows(config, plan, comm, precision, steps), timeout=300)
    return ranks[0], rows(config, PlanConfig(), SingleComm(), precision, steps)


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLANS.values(), ids=list(PLANS))
def test_200_steps_in_fp64(layout: LayoutConfig):
    many, one = both(SHORT, layout, "fp64", 200)
    assert one[-1]["loss"] < one[0]["loss"] - 1, "the model learns, so that the test means something"
    for a, b in zip(many, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9), a["step"]
        assert a["routing_hash"] == b["routing_hash"], a["step"]


@pytest.mark.parametrize("layout", PLANS.values(), ids=list(PLANS))
def test_fp32_until_a_routing_flip(layout: LayoutConfig):
    many, one = both(SHORT, layout, "fp32", 10)
    alike = 0
    for a, b in zip(many, one, strict=True):
        if a["routing_hash"] != b["routing_hash"]:
            break
        alike += 1
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
    assert alike >= 6
