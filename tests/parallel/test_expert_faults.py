"""Faults of other systems with experts on their own grid, each by the number under which it was reported.

Two steps of several ranks equal two steps of one process: losses, load, entropy, router bias, parameters and
gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.parallel import equal
from weft.build.model import assemble, tensors
from weft.config.errors import ConfigError
from weft.config.load import from_dict
from weft.data.batch import Batch, empty, join
from weft.parallel import fill
from weft.parallel.attend import ContextAttend
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.dispatch import ShardedExchange, expert_comms
from weft.parallel.ledger import LedgerComm
from weft.parallel.mesh import mesh_of
from weft.parallel.scan import ContextScan
from weft.parallel.threads import run_threads
from weft.plan.box import Box
from weft.plan.check import check
from weft.plan.dispatch import TRANSPORTS
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, StoreConfig
from weft.spec.run import CheckpointConfig, RunConfig, RunSettings, TrainConfig
from weft.train.loop import Trainer
from weft.train.saving import Saving
from weft.train.team import decoder_only

CPU = torch.device("cpu")
MODEL = replace(tiny.CONFIG, pattern="M*-E/*E", mtp_num_depths=2, moe_shared_expert_intermediate_size=24)


class Few:
    """Samples of so few tokens that ranks have none."""

    def __init__(self, lengths: tuple[int, ...], depths: int) -> None:
        self.lengths, self.depths = lengths, depths

    def microbatch(self, start: int, count: int) -> Batch:
        made = [tiny.batch(self.lengths, seed=g, depths=self.depths) for g in range(start, start + count)]
        return join(made) if made else empty(self.depths + 1)

    def state(self, samples: int) -> dict[str, Any]:
        return {"samples": samples}


def trainer_of(
    config: HybridConfig,
    plan: PlanConfig,
    comm: Comm,
    lengths: tuple[int, ...] = (5, 1, 5),
    samples: int = 4,
    micro: int = 4,
    **settings: Any,
) -> Trainer:
    """Two steps of so many samples; the same values under every plan."""
    mesh = mesh_of(plan, comm)
    train = TrainConfig(
        train_iters=2, global_batch_size=samples, micro_batch_size=micro, precision="fp64", loss_chunk=8
    )
    run = RunConfig(model=config, train=train, plan=plan, **settings)
    return Trainer(
        run, decoder_only(assemble(config, "fp64", CPU, 1, mesh), mesh), Few(lengths, config.depths)
    )


def told(trainer: Trainer, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any, dict[str, Tensor]]:
    """Rows, parameters and gradients by box, and router biases."""
    buffers = tensors(trainer.model, trainer.config.model)
    return rows, equal.boxes(trainer), {n: t.clone() for n, t in buffers.items() if n.endswith("router.bias")}


def assert_like_one(
    config: HybridConfig, plan: PlanConfig, ranks: int, one: dict[str, Any] | None = None, **batch: Any
) -> list[dict[str, Any]]:
    """Rows of one process, which so many ranks equal; ``one``: what of the batch is another for it."""
    alone = trainer_of(config, PlanConfig(), SingleComm(), **{**batch, **(one or {})})
    want_rows, want, want_bias = told(alone, equal.run(alone))
    whole = {name: tensor for name, _, tensor in want}

    def work(comm: Comm) -> list[str]:
        trainer = trainer_of(config, plan, comm, **batch)
        rows, boxes, bias = told(trainer, equal.run(trainer))
        return list(differences(rows, want_rows, boxes, whole)) + [
            name for name in bias if not torch.equal(bias[name], want_bias[name])
        ]

    found = run_threads(ranks, work)
    assert not any(found), found
    return want_rows


def differences(
    rows: list[dict[str, Any]], want_rows: list[dict[str, Any]], boxes: Any, whole: dict[str, Tensor]
) -> Iterator[str]:
    for row, want in zip(rows, want_rows[-len(rows) :], strict=True):
        yield from (f"step {row['step']}: {name}" for name in equal.differing(row, want))
        for name, entropy in row["router_entropy"].items():
            if entropy != pytest.approx(want["router_entropy"][name], rel=1e-10):
                yield f"step {row['step']}: entropy of {name}"
    for name, box, tensor in boxes:
        expected = whole[name][box.within(Box.whole(whole[name].shape))]
        if tensor.numel() and not (tensor - expected).abs().max() <= 1e-10:
            yield f"{name} {box}"


ALL_LOSSES = replace(
    MODEL,
    pattern="M*E",
    mtp_num_depths=0,
    router_batch_aux_loss_coef=0.4,
    router_global_aux_loss_coef=0.3,
    router_bias_update_rate=1e-2,
)
PADDED = replace(ALL_LOSSES, moe_capacity_factor=1.0, moe_pad_to_capacity=True)
LACKING = {
    "one of four readers has no sample": (LayoutConfig(dp=4), ExpertsConfig(ep=4), (5, 1, 5), 3),
    "shares of two and one": (LayoutConfig(dp=2), ExpertsConfig(ep=2), (5, 1, 5), 3),
    "one of four parts has no token": (LayoutConfig(cp=4), ExpertsConfig(ep=4), (2, 1), 1),
    "planes of more ranks than tokens": (LayoutConfig(tp=2, cp=2), ExpertsConfig(ep=2), (2, 1), 1),
}


@pytest.mark.parametrize(
    ("lacking", "config"),
    [(lacking, ALL_LOSSES) for lacking in LACKING] + [(lacking, PADDED) for lacking in list(LACKING)[::2]],
    ids=lambda given: "" if isinstance(given, str) else "padded" if given.moe_pad_to_capacity else "dropless",
)
def test_megatron_6111_router_statistics_count_padding(lacking, config):
    """Losses, load, entropy and the router's bias are of the tokens, whatever ranks lack or pad."""
    decoder, experts, lengths, samples = LACKING[lacking]
    ranks = (decoder.dp or 1) * decoder.cp * decoder.tp
    plan = PlanConfig(decoder=decoder, experts=experts)
    rows = assert_like_one(config, plan, ranks, lengths=lengths, samples=samples)
    assert all(row["aux_loss"] > 0 and row["z_loss"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("transport", "etp"), [("all_gather", 1), ("all_to_all", 1), ("per_rank", 2), ("per_node", 1)]
)
def test_bridge_5270_ranks_with_fewer_tokens_barely_learn(transport, etp):
    """Experts get the gradients of all tokens, however unevenly ranks have these."""
    experts = ExpertsConfig(ep=4 // etp, etp=etp, transport=transport, node=2)
    plan = PlanConfig(decoder=LayoutConfig(dp=4), experts=experts)
    assert_like_one(replace(MODEL, pattern="ME", mtp_num_depths=0), plan, 4, samples=5)


@pytest.mark.parametrize(
    ("decoder", "level"),
    [(LayoutConfig(dp=4), 0), (LayoutConfig(tp=2, dp=2), 3), (LayoutConfig(cp=2, dp=2), 2)],
    ids=["dp4", "tp2-dp2", "cp2-dp2"],
)
def test_megatron_1628_gradient_of_experts_cut_by_etp_alone(decoder, level):
    """ETP of 2 with EP of 1: their gradients are summed over the ranks that hold the same part, once."""
    decoder = replace(decoder, store=StoreConfig(level=level))
    plan = PlanConfig(decoder=decoder, experts=ExpertsConfig(ep=1, etp=2))
    assert_like_one(replace(MODEL, pattern="ME", mtp_num_depths=0), plan, 4)


PLANS = {
    "ep 4 over cp 2 dp 2": (4, PlanConfig(decoder=LayoutConfig(cp=2), experts=ExpertsConfig(ep=4))),
    "ep 2 etp 2 over tp 2": (4, PlanConfig(decoder=LayoutConfig(tp=2), experts=ExpertsConfig(ep=2, etp=2))),
    "etp 2 over tp 2": (4, PlanConfig(decoder=LayoutConfig(tp=2), experts=ExpertsConfig(etp=2))),
    "ep 2 of cp 3": (6, PlanConfig(decoder=LayoutConfig(cp=3), experts=ExpertsConfig(ep=2))),
}


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [("ep 4 over cp 2 dp 2", "ep 2 etp 2 over tp 2"), ("ep 2 of cp 3", "etp 2 over tp 2")],
)
def test_bridge_3414_5302_megatron_1773_checkpoint_tied_to_its_expert_grid(tmp_path: Path, saved, resumed):
    """Saved under one grid after a step, resumed under another: the second step is that of one process."""
    where = str(tmp_path / "run")
    alone = trainer_of(ALL_LOSSES, PlanConfig(), SingleComm(), samples=4)
    want_rows = equal.run(alone)
    whole = {name: tensor for name, _, tensor in equal.boxes(alone)}

    def save(comm: Comm) -> None:
        trainer = trainer_of(ALL_LOSSES, PLANS[saved][1], comm, samples=4, run=RunSettings(dir=where))
        trainer.step(1, trainer.batches(0))
        saving = Saving(trainer.config, comm)
        saving.save(1, trainer)
        saving.close()

    def go_on(comm: Comm) -> list[str]:
        settings = {"run": RunSettings(dir=f"{where}-again"), "checkpoint": CheckpointConfig(load=where)}
        trainer = trainer_of(ALL_LOSSES, PLANS[resumed][1], comm, samples=4, **settings)
        assert Saving(trainer.config, comm).restore(trainer) == 1
        rows, boxes, _ = told(trainer, equal.run(trainer, first=2))
        return list(differences(rows, want_rows, boxes, whole))

    run_threads(PLANS[saved][0], save)
    found = run_threads(PLANS[resumed][0], go_on)
    assert not any(found), found


MADE: dict[str, Callable[[Comm, Any], object]] = {
    "attend": ContextAttend,
    "scan": lambda comm, form: ContextScan(8, comm, form),
    "transport": lambda comm, transport: ShardedExchange(expert_comms(comm, 1, 8), 8, transport),
}


@pytest.mark.parametrize("role", MADE)
def test_iseekyan_182_a_missing_transport_falls_back_silently(role):
    """A name that nothing has is an error where it is given, not only in a plan."""
    with pytest.raises((ValueError, KeyError, TypeCheckError), match="nccl_ep"):
        MADE[role](LedgerComm(0, 2), "nccl_ep")
    section = "experts" if role == "transport" else "decoder"
    with pytest.raises(ConfigError, match="nccl_ep"):
        from_dict(PlanConfig, {section: {role: "nccl_ep"}})


@pytest.mark.parametrize(
    ("decoder", "experts", "message"),
    [
        (LayoutConfig(cp=8, attend="all_to_all"), ExpertsConfig(), "choose a cp that divides 4, or ring"),
        (LayoutConfig(cp=8, scan="all_to_all"), ExpertsConfig(), "choose a cp that divides 4, or states"),
        (LayoutConfig(), ExpertsConfig(ep=8, transport="per_node"), "choose per_rank, or set node"),
    ],
    ids=["attend", "scan", "transport"],
)
def test_iseekyan_182_an_impossible_form_falls_back_silently(decoder, experts, message):
    """What was asked for and cannot be is refused with the reason; nothing takes its place."""
    problems = check(MODEL, PlanConfig(decoder=decoder, experts=experts), 8)
    assert any(message in problem.message for problem in problems), problems


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_iseekyan_182_the_transport_that_is_asked_for_runs(transport, monkeypatch):
    """Nothing chooses where the plan has chosen."""
    made, real = [], ShardedExchange

    def listening(comms: Any, experts: int, transport: Any) -> ShardedExchange:
        made.append(transport)
        return real(comms, experts, transport)

    monkeypatch.setattr(fill, "ShardedExchange", listening)
    experts = ExpertsConfig(ep=4, transport=transport, node=2)
    mesh = mesh_of(PlanConfig(decoder=LayoutConfig(cp=2), experts=experts), LedgerComm(1, 4))
    assemble(replace(MODEL, pattern="E-E", mtp_num_depths=0), "fp32", torch.device("meta"), 1, mesh)
    assert made == [transport] * 2


class Indices(TorchDispatchMode):
    """Hears of 32-bit numbers that say where something lies."""

    PLACES = ("index", "gather", "scatter", "embedding", "searchsorted", "cumsum", "arange", "sort", "where")

    def __init__(self) -> None:
        super().__init__()
        self.short: set[str] = set()
        self.heard: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if any(word in name for word in self.PLACES):
            self.heard.add(name)
            every = [*args, *(kwargs or {}).values(), *(out if isinstance(out, tuple | list) else [out])]
            flat = [t for item in every for t in (item if isinstance(item, tuple | list) else [item])]
            if any(isinstance(t, Tensor) and t.dtype == torch.int32 for t in flat):
                self.short.add(name)
        return out


def test_mamba_1015_offsets_overflow_beyond_61k_tokens_no_short_index():
    """Whatever indexes a tensor has 64 bits, in every layer, forward and backward, over ranks and on one."""
    config = replace(ALL_LOSSES, moe_capacity_factor=1.0)

    def work(comm: Comm) -> tuple[set[str], set[str]]:
        decoder = LayoutConfig(cp=comm.size, attend="ring")
        plan = PlanConfig(decoder=decoder, experts=ExpertsConfig(ep=comm.size))
        trainer = trainer_of(config, plan, comm, (40, 1, 9), samples=1)
        with Indices() as indices:
            trainer.step(1, trainer.batches(0))
        return indices.short, indices.heard

    for short, heard in [work(SingleComm()), *run_threads(2, work)]:
        assert not short
        assert len(heard) > 5, "the mode hears"
