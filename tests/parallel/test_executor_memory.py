"""What an executor keeps, counted by the allocator of tensors, is what the proof of its list says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gangs import threads
from tests.parallel import equal, live, nets
from tests.parallel.plans import CHOICES, Case
from tests.parallel.test_executor import TIMEOUT, of_kind, towers
from weft.ops.late import gradient, queued
from weft.parallel.comm import Comm
from weft.parallel.offload import Kept, storage
from weft.plan.pipelines import KINDS
from weft.plan.prove import prove
from weft.plan.schedule import Action, Schedule
from weft.plan.step import schedule_of
from weft.spec.layout import LayoutConfig, PlanConfig, ScheduleConfig, StoreConfig


class Mark(torch.autograd.Function):
    """The identity, whose backward pass and gradient of a weight read a marker."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, marker: Tensor) -> Tensor:
        ctx.save_for_backward(marker)
        ctx.weight = queued(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (marker,) = ctx.saved_tensors
        return grad, gradient(ctx.weight, lambda given: given[:4].clone(), marker), None


class Marked(nets.Stage):
    """Keeps, besides all else, something whose size is that of no other pass."""

    def forward(self, inputs: Any, data: Tensor) -> Any:
        outputs, loss = super().forward(inputs, data)
        marker = torch.zeros(self.sizes[len(data)] // 8, dtype=torch.float64)
        outputs = {edge: Mark.apply(x, self.shift, marker) for edge, x in outputs.items()}
        return outputs, None if loss is None else Mark.apply(loss, self.shift, marker)


class MarkedNet(nets.Net):
    made = Marked


def marks(schedule: Schedule) -> dict[int, tuple[str, int]]:
    """Stage and microbatch by bytes of the marker."""
    every = [(stage, i) for stage in schedule.graph.home for i in range(schedule.microbatches)]
    return {4096 + 8 * at: each for at, each in enumerate(every)}


def counted(schedule: Schedule, comm: Comm) -> tuple[int, int]:
    """The most markers that lived, and the most that the executor counted; each moment is compared."""
    net, names = MarkedNet(schedule, comm), marks(schedule)
    for name, stage in net.stages.items():
        stage.sizes = {nets.rows(s, i): size for size, (s, i) in names.items() if s == name}
    made, seen = nets.executor(schedule, net), list[set[tuple[str, int]]]()

    def after(action: Action, sizes: list[int]) -> None:
        seen.append({names[size] for size in sizes if size in names})

    with live.watched(made, after):
        made.run()
    whole = {a[1:3] for a, b in zip(made.actions, made.actions[1:], strict=False) if b == a._replace(op="W")}
    for at, (now, expected) in enumerate(zip(seen, live.kept(made.actions), strict=True)):
        done = made.actions[at]
        early = {done[1:3]} & whole if done.op == "B" else set()  # W has nothing left to do
        assert now == expected - early, (comm.rank, at, str(done))
    return max(map(len, seen)), made.peak


@pytest.mark.parametrize("kind", [*KINDS, "towers"])
def test_live_passes_are_those_of_the_proof(kind: str) -> None:
    for ranks, microbatches, resident in ((2, 4, 0), (2, 4, 3), (4, 5, 0), (4, 5, 6)):
        form = {"resident": resident}
        schedule = towers(**form) if kind == "towers" else of_kind(kind, ranks, microbatches, **form)
        proof = prove(schedule)
        assert not proof.faults
        found = threads(len(schedule.lists), lambda comm: counted(schedule, comm), timeout=TIMEOUT)  # noqa: B023
        assert found == [(most, most) for most in proof.live], (ranks, resident)
        assert not resident or max(proof.live) <= resident


def plan_of(kind: str, level: int = 0, dp: int = 1, **schedule: Any) -> PlanConfig:
    decoder = LayoutConfig(pp=2, dp=dp, store=StoreConfig(level=level))
    return PlanConfig(decoder=decoder, schedule=ScheduleConfig(kind=kind, **schedule))


FIRST = {name: choices[0] for name, choices in CHOICES.items()}
CASE = Case(**(FIRST | {"microbatches": 4, "packed": True, "mtp": "one"}))


def ends(case: Case, plan: PlanConfig, comm: Comm) -> list[tuple[str, Tensor]]:
    """Parameters and gradients after two steps; peaks are compared with the proof on the way."""
    trainer = equal.trainer_of(case, plan, comm)
    equal.run(trainer)
    _, proof = schedule_of(plan.schedule, trainer.team.cut, 4, plan.decoder.store.level)
    assert not proof.faults
    assert trainer.executor.peak == proof.live[trainer.mesh.position]
    return [(name, tensor) for name, _, tensor in equal.boxes(trainer)]


@pytest.mark.parametrize(
    ("kind", "resident", "level", "gather", "recompute"),
    [
        ("1f1b", 1, 0, "unit", False),
        pytest.param("interleaved", 1, 0, "unit", True, marks=pytest.mark.slow),
        ("zbv", 3, 0, "unit", True),
        pytest.param("gpipe", 2, 3, "unit", False, marks=pytest.mark.slow),
        pytest.param("interleaved", 2, 3, "stage", True, marks=pytest.mark.slow),
        ("zbv", 3, 3, "stage", False),
    ],
)
def test_what_goes_out_changes_no_bit(
    kind: str, resident: int, level: int, gather: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    plain = Kept.out

    def out(self: Kept) -> None:
        before = self.bytes
        plain(self)
        moved.append(before - self.bytes)

    monkeypatch.setattr(Kept, "out", out)
    dp = 2 if level else 1
    case = replace(CASE, dp=dp, recompute=recompute)
    here, there = (
        threads(2 * dp, lambda comm: ends(case, plan_of(kind, level, dp, **form), comm))  # noqa: B023
        for form in ({}, {"gather": gather, "resident": resident})
    )
    assert moved
    assert all(size > 0 for size in moved)
    for one, other in zip(here, there, strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


SENT = 64 * 16 * 8  # bytes of the residual stream in the test below


def levels(comm: Comm, recompute: bool) -> None:
    """A step with one pass on the device at a time."""
    case, plan = replace(CASE, length=64, recompute=recompute), plan_of("interleaved", resident=1)
    trainer = equal.trainer_of(case, plan, comm)
    params = [(param.data_ptr(), storage(param)) for param in trainer.model.parameters()]
    found: list[int] = []
    with live.watched(trainer.executor, lambda action, sizes: found.append(sum(sizes))):
        trainer.step(1, trainer.batches(0))
    assert params == [(param.data_ptr(), storage(param)) for param in trainer.model.parameters()]
    flying, outs = 0, set[str]()
    actions = trainer.executor.actions
    for at, (done, kept, now) in enumerate(zip(actions, live.kept(actions), found, strict=True)):
        flying += (done.op == "POST") - (done.op == "WAIT")
        if done.op == "OUT":
            layers = len(trainer.team.cut.pieces[int(done.unit)].layers)
            # Recomputed layers keep their inputs, others much more.
            assert found[at - 1] - now >= layers * SENT * (1 if recompute else 3), str(done)
            outs.add(done.unit)
        if not kept:  # what is under way, or has come and is not read yet
            assert now < (flying + 2) * SENT + 4096, (str(done), now)
    assert outs == ({"0", "2"} if comm.rank == 0 else {"1"})


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_out_is_off_the_device(recompute: bool) -> None:
    """All that layers keep and what a stage has read; parameters stay."""
    threads(2, lambda comm: levels(comm, recompute))


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "virtual"), [("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 0)])
def test_split_passes_with_recomputation(kind: str, virtual: int, tp: int) -> None:
    """Equal to one process that neither splits nor recomputes."""
    case = replace(CASE, recompute=True, tp=tp, ep=tp, transport="all_to_all" if tp > 1 else "auto")
    decoder = replace(case.plan.decoder, pp=2)
    plan = replace(case.plan, decoder=decoder, schedule=ScheduleConfig(kind=kind, virtual=virtual))

    def run(comm: Comm) -> tuple[bool, list[str]]:
        trainer = equal.trainer_of(case, plan, comm)
        found = equal.compared(trainer, equal.run(trainer), case, case.batch[0])
        return trainer.executor.splits, found

    splits, found = zip(*threads(2 * tp, run), strict=True)
    assert any(splits)
    assert not any(found), found
