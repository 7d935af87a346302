"""The hybrid model against itself: packed against separate, recomputed against kept, counts."""

import pytest
import torch

from tests.tiny import CONFIG, batch, make, split
from weft.models import presets
from weft.models.hybrid import HybridLM
from weft.parallel.comm import SingleComm
from weft.spec.hybrid import HybridConfig
from weft.train.objective import count, objective, to_device

ALL = {name: value for name, value in vars(presets).items() if isinstance(value, HybridConfig)}


def gradients(model: HybridLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_module_holds_exactly_the_listed_tensors(name: str) -> None:
    config = ALL[name]
    with torch.device("meta"):
        model = HybridLM(config)
    held = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert held == {spec.name: spec.shape for spec in config.params()}
    assert sum(t.numel() for t in [*model.parameters(), *model.buffers()]) == sum(
        s.numel for s in config.params()
    )


@pytest.mark.parametrize("lengths", [(5, 8, 3), (16, 16), (1, 30, 2), (33,)])
def test_packed_equals_separate(lengths: tuple[int, ...]) -> None:
    packed = batch(lengths)
    totals = count([packed], SingleComm())
    model = make()
    loss, parts, _ = objective(model, to_device(packed), totals, chunk=7)
    loss.backward()
    together = gradients(model)
    model.zero_grad()
    sums = torch.zeros_like(parts)
    for document in split(packed):
        loss, parts, _ = objective(model, to_device(document), totals, chunk=7)
        loss.backward()
        sums += parts
    torch.testing.assert_close(
        sums, objective(model, to_device(packed), totals, chunk=7)[1], rtol=0, atol=1e-12
    )
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-10, atol=1e-12, msg=name)


def test_every_parameter_learns() -> None:
    packed = batch((40, 24))
    model = make()
    objective(model, to_device(packed), count([packed], SingleComm()), chunk=16)[0].backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_recompute_is_the_same_bits(precision: str) -> None:
    packed = batch((11, 20, 7))
    totals = count([packed], SingleComm())
    results = []
    for recompute in (False, True):
        model = make(precision)
        model.set_recompute(recompute)
        loss, _, reported = objective(model, to_device(packed), totals, chunk=16)
        loss.backward()
        results.append((loss.detach(), gradients(model), {k: s.counts for k, s in reported.stats.items()}))
    (loss_a, kept, counts_a), (loss_b, again, counts_b) = results
    assert torch.equal(loss_a, loss_b)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert all(torch.equal(counts_a[key], counts_b[key]) for key in counts_a)


def test_router_choices_are_replayed_and_not_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another bias at recomputation time the choices must still be those of the forward pass."""
    packed = batch((24,))
    totals = count([packed], SingleComm())
    model = make(pattern="ME", mtp_num_depths=0)
    reference = make(pattern="ME", mtp_num_depths=0)
    model.set_recompute(True)
    one = batch((24,), depths=0)
    totals = count([one], SingleComm())
    loss = objective(model, to_device(one), totals, chunk=16)[0]
    with torch.no_grad():
        model.layers["1"].mixer.router.bias.copy_(torch.linspace(5, -5, CONFIG.n_routed_experts))
    loss.backward()
    objective(reference, to_device(one), totals, chunk=16)[0].backward()
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=0, msg=name)


def test_repeated_mtp_depth_is_one_set_of_parameters() -> None:
    model = make()
    assert len(model.mtp) == 1
    packed = batch((30,))
    _, parts, reported = objective(model, to_device(packed), count([packed], SingleComm()), chunk=16)
    assert {"mtp.0.layers.1", "mtp.1.layers.1"} <= set(reported.stats)
    assert parts[1] > 0


def test_tied_head_reads_the_token_table() -> None:
    model = make(tie_word_embeddings=True)
    assert model.head.weight is model.embed.weight
    packed = batch((12,))
    objective(model, to_device(packed), count([packed], SingleComm()), chunk=16)[0].backward()
    assert "head.weight" not in {spec.name for spec in model.config.params()}
