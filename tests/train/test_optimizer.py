"""Weight decay groups, clipping and the router's correction bias, by hand."""

import math
import re

import pytest
import torch

from tests.tiny import make
from weft.models import presets
from weft.models.hybrid import HybridLM
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.store import Store
from weft.parallel.threads import run_threads
from weft.spec.run import OptimizerConfig
from weft.train.optimizer import Optimizer, RouterLoad, load_row

PRESETS = {name: value for name, value in vars(presets).items() if name.isupper()}
UNDECAYED = re.compile(
    r"(.*\.)?([eh]?norm\.weight|norm[12_]\w*\.weight|bias(_[uv])?|A_log|D|dt_bias|scale[12]|norm\.(mean|var))"
)
CONSTANTS = re.compile(r".*(router\.bias|conv\.norm\.(mean|var))")


def optimizer_of(model: HybridLM, **settings: float) -> tuple[Store, Optimizer]:
    store = Store(model, model.config.params(), "fp64")
    return store, Optimizer(store, OptimizerConfig(**settings))


def test_zero_gradients_leave_only_decay() -> None:
    model = make("fp64")
    before = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    store, optimizer = optimizer_of(model, weight_decay=0.25)
    store.zero_grad()
    optimizer.step(lr=0.5)
    after = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if UNDECAYED.fullmatch(name)}
    endings = ("norm.weight", "A_log", ".D", "dt_bias", "conv.bias", "router.bias", "enorm.weight")
    assert all(any(name.endswith(ending) for name in still) for ending in endings)
    for name in before.keys() - still:
        assert torch.equal(after[name], before[name] * (1 - 0.5 * 0.25)), name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_decays_in_every_preset(name: str) -> None:
    for spec in PRESETS[name].params():
        assert spec.decay == (UNDECAYED.fullmatch(spec.name) is None), spec.name
        assert spec.decay == (len(spec.shape) > 1 and not spec.name.endswith(("bias_u", "bias_v"))), spec.name
        assert spec.buffer == (CONSTANTS.fullmatch(spec.name) is not None), spec.name


def test_adam_of_one_step() -> None:
    """With bias correction the first update is lr * g / (|g| + eps), whatever the betas."""
    model = make("fp64")
    store, optimizer = optimizer_of(model, weight_decay=0.0, eps=1e-3)
    before = model.head.weight.detach().clone()
    for flat in store.flats:
        flat.grad.fill_(-0.002)
    optimizer.step(lr=0.1)
    torch.testing.assert_close(model.head.weight.detach(), before + 0.1 * 2 / 3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_large_gradients_are_scaled_to_the_limit(precision: str) -> None:
    model = make(precision)
    store = Store(model, model.config.params(), precision)
    optimizer = Optimizer(store, OptimizerConfig(clip_grad=0.5))
    for flat in store.flats:
        flat.grad.copy_(torch.linspace(-1, 2, flat.grad.numel()))
    before = [flat.grad.clone() for flat in store.flats]
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in before))
    assert store.norm().item() == pytest.approx(norm, rel=1e-6)
    optimizer.clip(store.norm())
    assert store.norm().item() == pytest.approx(0.5, rel=1e-5)
    for flat, grad in zip(store.flats, before, strict=True):
        torch.testing.assert_close(flat.grad, grad * (0.5 / norm), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("limit", "size"), [(1.0, 1e-4), (0.0, 1e4)])
def test_small_gradients_or_no_limit(limit: float, size: float) -> None:
    store, optimizer = optimizer_of(make("fp64"), clip_grad=limit)
    for flat in store.flats:
        flat.grad.fill_(size)
    before = [flat.grad.clone() for flat in store.flats]
    optimizer.clip(store.norm())
    assert all(torch.equal(f.grad, grad) for f, grad in zip(store.flats, before, strict=True))


COUNTS = {"layers.1": [4, 0, 2, 2], "mtp.0.layers.1": [3, 1, 0, 0], "mtp.1.layers.1": [0, 0, 4, 0]}
TOTALS = {"layers.1": [4, 0, 2, 2], "mtp.0.layers.1": [3, 1, 4, 0]}
SIGNS = {"layers.1": [-1, 1, 0, 0], "mtp.0.layers.1": [-1, 1, -1, 1]}


def moved(comm: Comm, rate: float, counts: dict[str, list[int]]) -> tuple[dict, dict]:
    """Totals, and how far each bias moved, in steps of 0.125."""
    model = make("fp64", n_routed_experts=4, num_experts_per_tok=2)
    model.load_state_dict({n: torch.zeros_like(t) for n, t in model.state_dict().items()})
    load = RouterLoad(model, model.device)
    for key, values in counts.items():
        load.add(key, torch.tensor(values))
    found = load.finish(comm, rate)
    assert load.counts == {}
    biases = {name: model.get_submodule(name).mixer.router.bias for name in found}
    return (
        {name: values.tolist() for name, values in found.items()},
        {name: (bias / 0.125).tolist() for name, bias in biases.items()},
    )


def test_bias_rises_where_load_is_below_the_mean() -> None:
    """A repeated MTP depth adds to its one physical layer; each expert moves by the rate and no more."""
    assert moved(SingleComm(), 0.125, COUNTS) == (TOTALS, SIGNS)


def test_equal_counts_and_rate_zero_move_nothing() -> None:
    assert moved(SingleComm(), 0.125, {"layers.1": [3, 3, 3, 3]})[1] == {"layers.1": [0, 0, 0, 0]}
    assert moved(SingleComm(), 0.0, COUNTS) == (TOTALS, {name: [0, 0, 0, 0] for name in TOTALS})


def test_the_bias_compares_whole_counts() -> None:
    """2^25 + 1 is no fp32 number: an even load of that size moves nothing, and a mean need not be whole."""
    model = make("fp32", n_routed_experts=4, num_experts_per_tok=2)
    bias = model.get_submodule("layers.1").mixer.router.bias
    big = 2**25 + 1
    cases = [
        ([big] * 4, [0, 0, 0, 0]),
        ([big, big, big, big - 4], [-1, -1, -1, 1]),
        ([3, 2, 2, 2], [-1, 1, 1, 1]),
    ]
    for counts, steps in cases:
        bias.zero_()
        load = RouterLoad(model, model.device)
        load.add("layers.1", torch.tensor(counts))
        load.finish(SingleComm(), 0.125)
        assert (bias / 0.125).tolist() == steps


def test_dropped_choices_count_for_the_bias_and_make_the_drop_rate() -> None:
    """Summed over microbatches, repetitions of a depth, and ranks."""

    def work(comm: Comm) -> tuple[dict, dict]:
        load = RouterLoad(make("fp64", n_routed_experts=4, num_experts_per_tok=2), torch.device("cpu"))
        for key, values in COUNTS.items():
            load.add(key, torch.tensor(values), torch.tensor(1 + comm.rank))
        counts = load.finish(comm, 0.0)
        return {name: c.tolist() for name, c in counts.items()}, load_row(counts, load.dropped)

    for size in (1, 2):
        for totals, row in run_threads(size, work):
            assert totals == {name: [size * n for n in values] for name, values in TOTALS.items()}
            drops = sum(1 + rank for rank in range(size))
            assert row["drop_rate"] == {"layers.1": drops / 8 / size, "mtp.0.layers.1": 2 * drops / 8 / size}
            assert row["drop_rate_total"] == 3 * drops / 16 / size
            assert row["expert_load_max"] == 2.0
            assert row["expert_load"]["layers.1"] == [0.5, 0, 0.25, 0.25]
    assert load_row({}, {}) == {}
    assert "drop_rate" not in load_row({"layers.1": torch.tensor([1, 1])})


def test_bias_follows_the_load_of_all_ranks() -> None:
    """Rank 0 alone would move every bias the other way."""
    shares = ({"layers.1": [0, 4, 0, 4]}, {"layers.1": [8, 0, 8, 0]})
    for totals, steps in run_threads(2, lambda comm: moved(comm, 0.125, shares[comm.rank])):
        assert totals == {"layers.1": [8, 4, 8, 4]}
        assert steps == {"layers.1": [-1, 1, -1, 1]}
