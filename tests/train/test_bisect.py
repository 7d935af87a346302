"""Plans that are equal agree; a fault of one rank is found in its unit, tensor and rank."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.gated_linear_attention import OutOfTreeConfig
from tests.tiny import CONFIG, batch
from weft.models.hybrid import HybridLM
from weft.nn import router
from weft.ops.router import route
from weft.parallel.mesh import Mesh
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import LayoutConfig, PlanConfig, ScheduleConfig
from weft.train import trace
from weft.train.bisect import Fault, Tally, bisect
from weft.train.trace import Step, Trace, run_plan

SAMPLES = [batch((6, 5), 0), batch((11,), 1), batch((3, 9), 2)]
Run = Callable[..., Tensor]
PHASES = ("weights", "forward", "losses", "backward", "gradients")


def compared(model: HybridConfig, precision: str = "fp64", **sizes: int) -> tuple[list[Tally], Fault | None]:
    """One process against a plan with these sizes."""
    decoder = LayoutConfig(**sizes)
    ranks = max(1, decoder.dp) * decoder.tp * decoder.tp_embed * decoder.pp
    schedule = ScheduleConfig(kind="zbv" if decoder.pp > 1 else "1f1b")
    several = run_plan(PlanConfig(decoder=decoder, schedule=schedule), ranks, Step(model, SAMPLES, precision))
    return bisect(alone(model, precision), several, precision)


@cache
def alone(model: HybridConfig, precision: str) -> Trace:
    return run_plan(PlanConfig(), 1, Step(model, SAMPLES, precision))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 2},
        {"tp_embed": 2},
        {"dp": 2},
        {"dp": 3},
        {"tp": 4},
        {"tp": 2, "tp_embed": 2},
        {"tp": 2, "dp": 2},
        {"pp": 2, "tp": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_equal_plans_agree(precision: str, sizes: dict[str, int]) -> None:
    """Two key/value heads and two groups, so four ranks share them; three samples, so two readers differ."""
    tallies, fault = compared(CONFIG, precision, **sizes)
    assert fault is None
    assert tuple(dict.fromkeys(tally.phase for tally in tallies)) == PHASES
    assert max(tally.difference for tally in tallies) < (1e-12 if precision == "fp64" else 1e-5)


def test_every_unit_and_slot_is_compared() -> None:
    tallies, _ = compared(CONFIG, tp=2)
    forward = {(t.unit, t.tensor) for t in tallies if t.phase == "forward"}
    assert forward >= {
        ("embed", "output"),
        ("layers.0", "norm"),
        ("layers.0", "mixer.in_proj"),
        ("layers.0", "mixer.scan"),
        ("layers.0", "mixer.norm"),
        ("layers.0", "mixer.out_proj"),
        ("layers.1", "mixer.router"),
        ("layers.1", "router choices"),
        ("layers.1", "mixer.latent_up.input"),
        ("layers.2", "mixer.o_proj.input"),
        ("layers.3", "output"),
        ("norm", "output"),
        ("mtp.1", "eh_proj"),
        ("mtp.1.layers.1", "router choices"),
        ("mtp.1", "norm"),
    }
    backward = {(t.unit, t.tensor) for t in tallies if t.phase == "backward"}
    assert backward == {name for name in forward if name[1] != "router choices"}
    names = {f"{t.unit}.{t.tensor}" for t in tallies if t.phase == "gradients"}
    assert names == {spec.name for spec in CONFIG.params()}


@pytest.mark.parametrize("latent", [0, 8])
def test_a_layer_from_outside_and_experts_at_full_width(latent: int) -> None:
    values = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    model = OutOfTreeConfig(**values | {"moe_latent_size": latent, "tie_word_embeddings": True})
    tallies, fault = compared(model, tp=2, tp_embed=2)
    assert fault is None
    tensors = {(t.unit, t.tensor) for t in tallies if t.phase == "forward"}
    assert ("layers.3", "mixer.norm") in tensors
    assert (("layers.1", "mixer.experts") in tensors) == (latent == 0)


def planted(monkeypatch: pytest.MonkeyPatch, rank: int, change: Callable[[HybridLM], None]) -> None:
    """``change`` the model of one rank wherever ranks are several."""
    whole = trace.assemble

    def assemble(*arguments: Any) -> HybridLM:
        model, mesh = whole(*arguments), arguments[-1]
        assert isinstance(mesh, Mesh)
        if mesh.comm.size > 1 and mesh.rank == rank:
            change(model)
        return model

    monkeypatch.setattr(trace, "assemble", assemble)


def wrap(model: HybridLM, path: str, around: Callable[[Run], Run]) -> None:
    """Replace what a slot does."""
    slot = model.get_submodule(path)
    slot.forward = around(slot.forward)


def scaled(factor: float) -> Callable[[Run], Run]:
    return lambda run: lambda *given: run(*given) * factor


def found(**sizes: int) -> Fault:
    _, fault = compared(CONFIG, **sizes)
    assert fault is not None
    return fault


def test_a_wrong_scale_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's tokens of one projection back to the residual."""
    planted(monkeypatch, 1, lambda model: wrap(model, "layers.2.mixer.o_proj.product", scaled(1.001)))
    fault = found(tp=2)
    assert (fault.at.phase, fault.at.unit, fault.at.tensor) == ("forward", "layers.2", "mixer.o_proj")
    assert fault.ranks == ((0,), (1,))
    assert fault.values[1] == pytest.approx(1.001 * fault.values[0])
    assert fault.row in range(17, 34)
    assert fault.box == (17, 33, 0, 15)
    assert fault.before == Tally("forward", "layers.2", "mixer.o_proj.input", fault.before.difference, False)


def test_a_wrong_summand_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs agree, so the projection itself is named; its sum spoils the rows of all ranks."""

    def one_summand(run: Run) -> Run:
        return lambda x, weight, tokens: run(x, 1.001 * weight, tokens)

    planted(monkeypatch, 1, lambda model: wrap(model, "layers.0.mixer.out_proj.product", one_summand))
    fault = found(tp=2)
    assert (fault.at.unit, fault.at.tensor) == ("layers.0", "mixer.out_proj")
    assert fault.before is not None
    assert fault.before.tensor == "mixer.norm"
    assert fault.spread == (0, 1)


class Doubled(torch.autograd.Function):
    """The identity with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def doubled(run: Run) -> Run:
    return lambda x, *more: run(Doubled.apply(x), *more)


@pytest.mark.parametrize("slot", ["scan", "out_proj.product"])
def test_a_wrong_gradient_of_one_rank(slot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass agrees; what goes into the slot gets a gradient twice too large."""
    planted(monkeypatch, 2, lambda model: wrap(model, f"layers.0.mixer.{slot}", doubled))
    fault = found(tp=2, dp=2)
    tensor = {"scan": "mixer.in_proj", "out_proj.product": "mixer.norm"}[slot]
    assert (fault.at.phase, fault.at.unit, fault.at.tensor) == ("backward", "layers.0", tensor)
    assert fault.ranks == ((0,), (2,))
    assert fault.spread == (2,)


def test_a_wrong_gradient_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers each have a summand of it, so all of them are named."""

    def change(model: HybridLM) -> None:
        model.layers["0"].mixer.D.register_hook(lambda grad: 2 * grad)

    planted(monkeypatch, 1, change)
    fault = found(dp=2)
    assert (fault.at.phase, fault.at.unit, fault.at.tensor) == ("gradients", "layers.0", "mixer.D")
    assert fault.ranks == ((0,), (0, 1))


def test_a_router_choice_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of the second repetition of the MTP depth goes to another expert."""
    biases: list[Tensor] = []
    calls: list[int] = []

    def other(logits: Tensor, bias: Tensor, *more: Any, **options: Any) -> Any:
        found = route(logits, bias, *more, **options)
        calls.extend([1] * any(bias is one for one in biases))
        if len(calls) != 2 or not any(bias is one for one in biases):
            return found
        chosen = found[1].clone()
        chosen[2, 1] = next(e for e in range(8) if e not in chosen[2])
        return route(logits, bias, *more, **options | {"choices": chosen})

    def change(model: HybridLM) -> None:
        biases.append(model.mtp[0].layers[1].mixer.router.bias)

    monkeypatch.setattr(router, "route", other)
    planted(monkeypatch, 3, change)
    fault = found(tp=2, tp_embed=2)
    assert (fault.at.phase, fault.at.unit, fault.at.tensor) == ("forward", "mtp.1.layers.1", "router choices")
    assert fault.ranks[1] == fault.spread == (3,)
    assert (fault.row, fault.column) == (28, 1)  # of 34 tokens, ranks have 9, 8, 9 and 8
    assert fault.at.difference == pytest.approx(1 / (34 * 3))


def test_wrong_weights_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key/value heads are shared by two ranks each; a copy that is wrong is found before anything runs."""

    def change(model: HybridLM) -> None:
        with torch.no_grad():
            model.layers["2"].mixer.qkv_proj.weight[-1, 3] += 1e-3

    planted(monkeypatch, 3, change)
    fault = found(tp=4)
    assert (fault.at.phase, fault.at.unit, fault.at.tensor) == (
        "weights",
        "layers.2",
        "mixer.qkv_proj.weight",
    )
    assert fault.ranks[1] == (3,)
    assert (fault.row, fault.column) == (63, 3)


def test_a_tensor_that_only_one_plan_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process multiplies through the shared expert in one operation."""
    planted(monkeypatch, 0, lambda model: wrap(model, "layers.1.mixer.shared.up_proj.product", scaled(1.001)))
    fault = found(tp=2)
    assert (fault.at.unit, fault.at.tensor) == ("layers.1", "output")
    assert [tensor for _, tensor in fault.unseen] == [
        "mixer.shared.up_proj",
        "mixer.shared.down_proj.input",
        "mixer.shared.down_proj",
    ]


def test_what_is_not_a_number_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = scaled(float("nan"))
    planted(monkeypatch, 1, lambda model: wrap(model, "layers.3.mixer.down_proj.product", nothing))
    fault = found(tp=2)
    assert (fault.at.unit, fault.at.tensor, fault.ranks[1]) == ("layers.3", "output", (1,))
    assert fault.values[1] != fault.values[1]
