"""Many steps under a plan against one process, outside pytest: type checks of every call would take minutes.

python -m tests.parallel.long PLAN fp64 200    # exit status 1 where losses or routing differ
"""

import sys
from dataclasses import replace
from typing import Any

import torch

from tests.parallel.equal import Samples
from tests.tiny import CONFIG
from weft.build.model import assemble
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.mesh import mesh_of
from weft.parallel.threads import run_threads
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, StoreConfig
from weft.spec.run import OptimizerConfig, RunConfig, SchedulerConfig, TrainConfig
from weft.train.loop import Trainer
from weft.train.team import decoder_only

MODEL = replace(CONFIG, initializer_range=0.05, pattern="M*E", mtp_num_depths=0)
PLANS = {
    "tp2-dp2-level3": PlanConfig(decoder=LayoutConfig(tp=2, dp=2, store=StoreConfig(level=3))),
    "3d-level1": PlanConfig(decoder=LayoutConfig(tp=2, tp_embed=2, store=StoreConfig(level=1))),
    "dp4-hybrid": PlanConfig(decoder=LayoutConfig(dp=4, store=StoreConfig(level=2, shards=2))),
    "cp2-tp2-ep4": PlanConfig(decoder=LayoutConfig(cp=2, tp=2), experts=ExpertsConfig(ep=4)),
}


def rows(
    config: HybridConfig, plan: PlanConfig, comm: Comm, precision: str, steps: int
) -> list[dict[str, Any]]:
    """Rows of so many steps on eight batches, again and again."""
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
    trainer = Trainer(run, decoder_only(model, mesh), Samples(packed=True, length=11, depths=config.depths))
    return [trainer.step(i, trainer.batches(4 * ((i - 1) % 8))) for i in range(1, steps + 1)]


def both(name: str, precision: str, steps: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of four ranks and of one process, step by step."""
    ranks = run_threads(4, lambda comm: rows(MODEL, PLANS[name], comm, precision, steps), timeout=300)
    return list(zip(ranks[0], rows(MODEL, PlanConfig(), SingleComm(), precision, steps), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, precision, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    found = both(name, precision, steps)
    flips = [i for i, (a, b) in enumerate(found) if a["routing_hash"] != b["routing_hash"]] or [steps]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in found[: flips[0]])
    learned = found[0][1]["loss"] - found[-1][1]["loss"]
    print(f"{flips[0]} steps are routed alike, losses differ by {worst:.1e}; learned {learned:.2f}")  # noqa: T201
    exact = worst <= 1e-9 and flips[0] == steps and learned > 1
    raise SystemExit(not (exact if precision == "fp64" else worst <= 1e-5 and flips[0] >= 6))
