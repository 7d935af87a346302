"""A checkpoint of one plan goes on under any other, on any number of ranks, each reading its boxes only."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parallel import equal, plans
from weft.checkpoint.load import Checkpoint
from weft.parallel.comm import Comm
from weft.parallel.threads import run_threads
from weft.plan.box import Box
from weft.spec.run import CheckpointConfig, RunConfig
from weft.train.loop import Trainer
from weft.train.saving import Saving

SAMPLES, PAIRS = (4, 2), 7


def saving(trainer: Trainer, comm: Comm, load: str = "", background: bool = False) -> Saving:
    config: RunConfig = trainer.config
    checkpoint = CheckpointConfig(load=load, async_save=background)
    return Saving(replace(config, checkpoint=checkpoint), comm)


def save_after_one_step(case: plans.Case, directory: str, background: bool) -> None:
    def work(comm: Comm) -> None:
        trainer = equal.trainer_of(case, case.plan, comm, SAMPLES, directory)
        trainer.step(1, trainer.batches(0))
        saver = saving(trainer, comm, background=background)
        saver.save(1, trainer)
        saver.close()

    run_threads(case.ranks, work)


def go_on(case: plans.Case, directory: str) -> list[list[str]]:
    def work(comm: Comm) -> list[str]:
        trainer = equal.trainer_of(case, case.plan, comm, SAMPLES, f"{directory}-again")
        assert saving(trainer, comm, load=directory).restore(trainer) == 1
        return equal.compared(trainer, equal.run(trainer, first=2), case, SAMPLES[0])

    return run_threads(case.ranks, work)


def pairs() -> list[tuple[plans.Case, plans.Case]]:
    """Plans of different ranks and stores for one model each."""
    usable = [case for case in plans.cases(200) if case.dp <= SAMPLES[0] and case.ranks <= 4]
    first, second = usable[:PAIRS], usable[PAIRS : 2 * PAIRS]
    first = [replace(case, balance="document") for case in first]  # else it matters what is read together
    layout = (*plans.AXES, "attend", "scan", "transport", "level", "hybrid")
    both = zip(first, second, strict=True)
    moved = [replace(a, **{name: getattr(b, name) for name in layout}) for a, b in both]
    return [(a, b) for a, b in zip(first, moved, strict=True) if not list(b.faults)]


@pytest.mark.parametrize(("one", "other"), pairs(), ids=str)
def test_goes_on_under_another_plan(tmp_path: Path, one: plans.Case, other: plans.Case):
    save_after_one_step(one, str(tmp_path / "run"), background=one.packed)
    found = go_on(other, str(tmp_path / "run"))
    assert not any(found), found


def test_a_rank_reads_its_boxes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = {name: values[0] for name, values in plans.CHOICES.items()}
    case = plans.Case(**base | {"tp": 2, "dp": 2, "level": 3})
    save_after_one_step(case, str(tmp_path / "run"), background=False)
    read, asked = Checkpoint.read, []

    def listening(self: Checkpoint, name: str, box: Box | None = None):
        asked.append((name, (box or Box.whole(self.shape(name))).numel))
        return read(self, name, box)

    monkeypatch.setattr(Checkpoint, "read", listening)
    assert not any(go_on(case, str(tmp_path / "run")))
    config = equal.model_of(case)
    whole = sum(spec.numel for spec in config.params() if not spec.buffer)
    copies = sum(n for name, n in asked if name.startswith("optimizer/exp_avg/")) / whole
    assert 1 <= copies < 2, "each box once, but for those that the two ranks of a plane share"
