"""Experts over ranks that the decoder uses for tensor, context and data parallelism: MoE parallel folding.

arXiv 2504.14960. The sweep of plans (``test_plans.py``) has many more such grids; these are kept by name, on
processes.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.gangs import Gangs
from tests.parallel import equal, plans
from weft.models.hybrid import HybridLM
from weft.parallel.comm import Comm
from weft.parallel.threads import run_threads
from weft.train.loop import NotFinite

BASE = plans.Case(
    **{name: values[0] for name, values in plans.CHOICES.items()}
    | {"length": 11, "kv_heads": 2, "groups": 2, "packed": True, "mtp": "one", "level": 1}
)
LAYOUTS = {
    "tp=2 dp=2 ep=4": {"tp": 2, "dp": 2, "ep": 4},
    "cp=2 dp=2 ep=4": {"cp": 2, "dp": 2, "ep": 4},
    "tp=2 cp=2 ep=4": {"tp": 2, "cp": 2, "ep": 4},
    "dp=4 ep=2 etp=2": {"dp": 4, "ep": 2, "etp": 2},
}


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_equal_one(layout: str, routing: str, processes: Gangs) -> None:
    case = replace(BASE, **LAYOUTS[layout], routing=routing)
    assert not list(case.faults)
    found = processes(4).run("tests.parallel.equal:on_processes", equal.as_arguments(case))
    assert found == [[]] * 4


def trained(case: plans.Case, change: Callable[[HybridLM], None]) -> list[list[dict]]:
    """Rows of every rank after ``change`` of the model."""

    def work(comm: Comm) -> list[dict]:
        trainer = equal.trainer_of(case, case.plan, comm)
        change(trainer.model)
        return equal.run(trainer)

    return run_threads(case.ranks, work)


@pytest.mark.parametrize("routing", ["dropless", "sequence", "padded"])
def test_an_expert_that_every_token_chooses(routing: str) -> None:
    """One rank gets every token, the others hardly any; nothing differs from one process."""

    def crowd(model: HybridLM) -> None:
        for name, bias in model.named_buffers():
            if name.endswith("router.bias"):
                bias[:3] += 100.0  # top-3: the first expert, and two beside it

    case = replace(BASE, cp=2, dp=2, ep=4, routing=routing)
    alone = replace(BASE, routing=routing, microbatches=2)  # as many samples, in one process
    (want,) = trained(alone, crowd)
    for rows in trained(case, crowd):
        assert not [name for row, one in zip(rows, want, strict=True) for name in equal.differing(row, one)]
        assert rows[0]["expert_load_max"] == pytest.approx(8 / 3)


@pytest.mark.parametrize("routing", ["dropless", "padded"])
def test_a_router_that_is_not_finite_is_named(routing: str) -> None:
    def spoil(model: HybridLM) -> None:
        with torch.no_grad():
            model.get_parameter("layers.3.mixer.router.weight")[0, 0] = float("nan")

    with pytest.raises(NotFinite, match="router logits of layers.3 are not finite"):
        trained(replace(BASE, dp=2, ep=2, routing=routing), spoil)
