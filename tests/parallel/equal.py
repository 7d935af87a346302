"""N ranks equal one rank: two steps of the trainer under a plan against one process, box by box."""

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.once import once
from tests.parallel.gated_linear_attention import OutOfTreeConfig
from tests.parallel.plans import Case
from weft.build.model import assemble_from, tensors
from weft.data.batch import Batch, empty, join
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.mesh import mesh_of
from weft.plan.box import Box
from weft.spec.data import DataConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig, RunSettings, TrainConfig
from weft.train.loop import Trainer
from weft.train.team import decoder_only

TOLERANCE = 1e-10
CPU = torch.device("cpu")


class Samples:
    """Sample g: random tokens, packed documents or one, the same wherever it is read."""

    def __init__(self, packed: bool, length: int, depths: int) -> None:
        documents = (2, 1) if length < 7 else (5, 1, length - 6)
        self.lengths, self.depths = documents if packed else (length,), depths

    def microbatch(self, start: int, count: int) -> Batch:
        if not count:
            return empty(self.depths + 1)
        made = [tiny.batch(self.lengths, seed=g, depths=self.depths) for g in range(start, start + count)]
        return join(made)

    def state(self, samples: int) -> dict[str, Any]:
        return {"samples": samples}


def model_of(case: Case) -> HybridConfig:
    """The tiny model of a case."""
    config = replace(tiny.CONFIG, **case.model)
    if case.layer == "out_of_tree":
        return OutOfTreeConfig(**{f.name: getattr(config, f.name) for f in fields(config)})
    return config


@once(4)
def values_of(config: HybridConfig, seed: int = 1) -> dict[str, Tensor]:
    """Every parameter and buffer, all at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.name: 0.3 * torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        + (1.0 if "norm" in spec.name else 0.0)
        for spec in config.params()
    }


def trainer_of(
    case: Case, plan: PlanConfig, comm: Comm, batch: tuple[int, int] | None = None, directory: str = ""
) -> Trainer:
    """A trainer of the case's model under a plan; ``batch``: samples of a step, and of a forward pass."""
    config, (samples, micro) = model_of(case), batch or case.batch
    values = values_of(config)

    def read(name: str, box: Box) -> Tensor:
        return values[name][box.within(Box.whole(values[name].shape))].clone()

    mesh = mesh_of(plan, comm, config)
    train = TrainConfig(
        train_iters=2,
        global_batch_size=samples,
        micro_batch_size=micro,
        precision="fp64",
        recompute=case.recompute,
        loss_chunk=16,
    )
    data = DataConfig(seq_length=case.length)
    run = RunConfig(run=RunSettings(dir=directory), model=config, train=train, data=data, plan=plan)
    model = assemble_from(config, "fp64", CPU, read, mesh)
    return Trainer(run, decoder_only(model, mesh), Samples(case.packed, case.length, config.depths))


Boxes = list[tuple[str, Box, Tensor]]


def boxes(trainer: Trainer) -> Boxes:
    """Parameters and gradients in global coordinates, what this rank owns of them."""
    kinds: dict[str, Callable] = {"param": lambda flat: flat.master, "grad": lambda flat: flat.grad}
    return [
        (f"{kind} {stored.name}", stored.box, stored.tensor.clone())
        for kind, values in kinds.items()
        for stored in trainer.store.pieces(values)
        if stored.owned
    ]


def run(trainer: Trainer, first: int = 1) -> list[dict[str, Any]]:
    """The rows of the steps from ``first`` to the second."""
    return [trainer.step(i, trainer.batches(trainer.samples)) for i in range(first, 3)]


def differences(case: Case, comm: Comm) -> list[str]:
    """What differs on this rank from one process."""
    trainer = trainer_of(case, case.plan, comm)
    return compared(trainer, run(trainer), case, case.batch[0])


def compared(trainer: Trainer, rows: list[dict[str, Any]], case: Case, samples: int) -> list[str]:
    """What differs in the last rows, and after them, from two steps of one process on as many samples."""
    # A balance loss over a forward pass needs the same samples in one; all else does not depend on that.
    together = samples if case.balance == "document" else case.together
    want_rows, want = reference(model_of(case), samples, together, case.packed, case.length)
    pairs = zip(rows, want_rows[-len(rows) :], strict=True)
    found = [f"step {row['step']}: {name}" for row, one in pairs for name in differing(row, one)]
    seen: dict[str, int] = {}
    for name, box, tensor in boxes(trainer):
        expected = want[name][box.within(Box.whole(want[name].shape))]
        seen[name] = seen.get(name, 0) + tensor.numel()
        error = (tensor - expected).abs().max().item() if tensor.numel() else 0.0
        if not error <= TOLERANCE:
            found.append(f"{name} {box}: {error:.3g}")
    for name, tensor in tensors(trainer.model, trainer.model.config, trainer.mesh).items():
        if name.endswith("router.bias") and not torch.equal(tensor, want[f"buffer {name}"]):
            found.append(f"buffer {name}")
    return found + _missing(seen, want, trainer.comm)


@once(64)
def reference(
    config: HybridConfig, samples: int, together: int, packed: bool, length: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Two steps of one process, so many samples together: rows, every parameter, gradient and buffer."""
    train = TrainConfig(
        train_iters=2, global_batch_size=samples, micro_batch_size=together, precision="fp64", loss_chunk=64
    )
    values = values_of(config)
    mesh = mesh_of(PlanConfig(), SingleComm())
    model = assemble_from(config, "fp64", CPU, lambda name, box: values[name].clone(), mesh)
    trainer = Trainer(
        RunConfig(model=config, train=train),
        decoder_only(model, mesh),
        Samples(packed, length, config.depths),
    )
    rows = run(trainer)
    whole = {name: tensor for name, _, tensor in boxes(trainer)}
    return rows, whole | {f"buffer {n}": t.clone() for n, t in tensors(model, config).items()}


def differing(row: dict[str, Any], one: dict[str, Any]) -> list[str]:
    """Names of what two rows of a step do not share."""
    close = ("loss", "lm_loss", "mtp_loss", "aux_loss", "z_loss", "grad_norm")
    wrong = [n for n in close if not abs(row[n] - one[n]) <= TOLERANCE * max(1.0, abs(one[n]))]
    return wrong + [
        n
        for n in ("tokens", "samples", "routing_hash", "expert_load", "drop_rate")
        if row.get(n) != one.get(n)
    ]


def _missing(seen: dict[str, int], want: dict[str, Tensor], comm: Comm) -> list[str]:
    """Parameters of which the ranks together own too much or too little."""
    everyone = comm.gather_objects(seen)
    totals = {name: sum(rank.get(name, 0) for rank in everyone) for name in want if "buffer" not in name}
    return [f"{n}: {total} elements owned" for n, total in totals.items() if total != want[n].numel()]


def on_processes(comm: Comm, case: dict[str, Any]) -> list[str]:
    """``differences`` for a gang of processes."""
    return differences(Case(**case), comm)


def as_arguments(case: Case) -> dict[str, Any]:
    """A case as JSON values."""
    return {"case": asdict(case)}
