"""200 steps of ``digits_vlm`` under four plans give the losses of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weft.build.model import drawn
from weft.config.load import from_dict, to_dict
from weft.config.text import parse_file
from weft.parallel.comm import Comm
from weft.parallel.threads import run_threads
from weft.plan.plans import plans_of_run
from weft.recipes.digits import digits_vlm
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig
from weft.train.loop import Trainer
from weft.train.source import open_source
from weft.train.team import assembled

STEPS = 200
CPU = torch.device("cpu")
PLANS = ("homogeneous", "colocated", "disjoint", "overlapping")


def plan_of(name: str) -> PlanConfig:
    values = parse_file(Path(f"plans/digits_{name}.yaml")).values
    base = to_dict(PlanConfig())
    merged = {**base, **{k: {**base.get(k, {}), **v} for k, v in values.items()}}
    return from_dict(PlanConfig, merged)


def losses(config: RunConfig, ranks: int, steps: int) -> list[float]:
    """The loss of every step; the same on all ranks."""

    def work(comm: Comm) -> list[float]:
        torch.set_num_threads(1)
        source = open_source(config, config.data)
        plans = plans_of_run(config, comm.size)
        values = drawn(config.run.seed)
        team = assembled(plans, config.modules, comm, config.train.precision, CPU, values)
        trainer = Trainer(config, team, source.loader(config, None), source.fetch)
        batch = config.train.global_batch_size
        batches = (trainer.batches(batch * i) for i in range(steps))
        return [trainer.next_step(i + 1, batches)["loss"] for i in range(steps)]

    found = run_threads(ranks, work, 120)
    assert all(own == found[0] for own in found)
    return found[0]


def worst(pattern: str, precision: str, name: str, cache: Path, steps: int = STEPS) -> float:
    """The largest difference of a loss between a plan and one process."""
    base = digits_vlm()
    config = replace(
        base,
        model=replace(base.model, pattern=pattern),
        optimizer=replace(base.optimizer, lr=3e-4, min_lr=3e-6),  # at more, training amplifies roundings
        data=replace(base.data, cache=str(cache)),
        train=replace(
            base.train, train_iters=steps, global_batch_size=6, micro_batch_size=2, precision=precision
        ),
    )
    alone = losses(config, 1, steps)
    ours = losses(replace(config, plan=plan_of(name)), 4, steps)
    assert alone[-1] < alone[0] / 2
    return max(abs(a - b) for a, b in zip(alone, ours, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_dense_in_fp32(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = worst("M*-M-", "fp32", name, tmp_path_factory.getbasetemp() / "digits")
    assert found <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_with_experts_in_fp64(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = worst("M*EM-", "fp64", name, tmp_path_factory.getbasetemp() / "digits")
    assert found <= 1e-9


@pytest.mark.parametrize("name", ["colocated", "overlapping"])
def test_a_few_steps(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = digits_vlm()
    cache = tmp_path_factory.getbasetemp() / "digits"
    train = replace(base.train, global_batch_size=6, micro_batch_size=2, precision="fp64", train_iters=30)
    config = replace(base, data=replace(base.data, cache=str(cache)), train=train)
    alone, ours = losses(config, 1, 3), losses(replace(config, plan=plan_of(name)), 4, 3)
    assert ours == pytest.approx(alone, rel=1e-11)
