"""Faults that other systems had in their routers, each by the number under which it was reported."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from routers import EXPERTS, KEY, TOP_K, Cut, assert_same, make_router, routed, tokens
from torch import Tensor

from tests.tiny import batch, make, split
from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.nn.context import Context, Replay
from weft.ops.segments import Segments
from weft.parallel.comm import SingleComm
from weft.train.objective import count, objective, to_device

LOSSES = {"aux_coef": 0.7, "batch_coef": 0.4, "global_coef": 0.3, "z_coef": 0.2}
MODEL = {
    "router_aux_loss_coef": 0.7,
    "router_batch_aux_loss_coef": 0.4,
    "router_global_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.2,
}


def step(model: HybridLM, batches: list[Batch], **known: Any) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Sum of the loss parts, all gradients and the tally of a step of these microbatches."""
    totals = count(batches, SingleComm())
    parts, tally = torch.zeros(4, dtype=torch.float64), {}
    model.zero_grad()
    for one in batches:
        loss, own, _ = objective(model, to_device(one), totals, 16, tally=tally, **known)
        loss.backward()
        parts += own
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return parts, grads, tally


def assert_equal_steps(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    for name, grad in a[1].items():
        torch.testing.assert_close(grad, b[1][name], rtol=tolerance, atol=tolerance * grad.abs().max().item())


@pytest.mark.parametrize(
    "settings", [{}, {"moe_capacity_factor": 0.7, "moe_jitter": 0.1}], ids=["", "dropping"]
)
def test_megatron_1330_aux_loss_doubled_under_recompute(settings: dict[str, Any]) -> None:
    """Also what the global loss has counted: the second run of a layer must not count again."""
    model = make("fp64", **MODEL, **settings)
    packed = [batch((9, 4), seed=1), batch((6, 7), seed=2)]
    plain = step(model, packed)
    model.set_recompute(True)
    again = step(model, packed)
    assert_equal_steps(plain, again)
    assert all(torch.equal(plain[2][key], again[2][key]) for key in plain[2])
    assert all(counts.sum() == 26 * TOP_K for counts in again[2].values())


@pytest.mark.parametrize("cut", [Cut(1, (7,), 4), Cut(1, (3, 0, 4), 1), Cut(1, (5, 2), 2)], ids=str)
def test_megatron_7452_aux_loss_gradient_doubled_with_padding_under_tp(cut: Cut) -> None:
    """7 tokens on 3 or 4 ranks: where others pad and mask, ranks have unequal numbers of tokens, or none."""
    router = make_router(**LOSSES)
    one = routed(router, tokens(7), [(3, 4)])
    assert_same(one, routed(router, tokens(7), [(3, 4)], cut=cut))


def test_torchtitan_2061_aux_loss_wrong_under_accumulation() -> None:
    """Microbatches add up: neither a mean over them nor a factor of their number."""
    model = make("fp64", router_aux_loss_coef=0.7, router_z_loss_coef=0.2)
    packed = batch((9, 4, 6))
    assert_equal_steps(step(model, [packed]), step(model, split(packed)))


def test_torchtitan_2061_batch_loss_unsupported_under_accumulation() -> None:
    """The balance of a step is the mean over its tokens of what each forward pass (and those before) say."""
    router, x = make_router(batch_coef=0.4, global_coef=0.3), tokens(20)
    tally: dict[str, Tensor] = {}
    found, want = 0.0, 0.0
    seen = torch.zeros(EXPERTS, dtype=torch.float64)
    for rows in (slice(0, 6), slice(6, 7), slice(7, 20)):
        own = x[rows]
        choice = router.choose(own, Context(Segments((len(own),)), tally=tally), KEY)
        assert choice.stats
        found += choice.stats.balance.item()
        p = (own @ router.weight.T).sigmoid()
        p = (p / p.sum(-1, keepdim=True)).sum(0)
        now = choice.stats.counts.double()
        seen += now
        frequency = 0.4 * now / now.sum() + 0.3 * seen / seen.sum()
        want += (EXPERTS * frequency * p).sum().item()
    assert found == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("cut", [Cut(1, (7,), 4), Cut(2, (7,), 1), Cut(1, (4, 3), 2)], ids=str)
def test_megatron_6111_statistics_count_padding(cut: Cut) -> None:
    """Every token is counted once, whatever ranks would have to pad to; entropy is the mean of as many."""
    router = make_router()
    lengths = [(3, 4)] * cut.dp
    x = tokens(7 * cut.dp)
    found = routed(router, x, lengths, cut=cut)
    assert sum(found.counts) == 7 * cut.dp * TOP_K
    scores = (x @ router.weight.T).sigmoid()
    p = scores / scores.sum(-1, keepdim=True)
    assert found.sums[2] == pytest.approx(-(p * p.log()).sum().item(), rel=1e-12)


def test_bridge_5270_ranks_with_fewer_tokens_barely_learn() -> None:
    """A token weighs the same whether its rank has 1 token or 11."""
    router = make_router(**LOSSES)
    lengths, cut = [(2, 10)], Cut(1, (1, 11), 1)
    assert_same(routed(router, tokens(12), lengths), routed(router, tokens(12), lengths, cut=cut))


def test_megatron_1494_aux_loss_differs_with_static_shapes() -> None:
    """Padding to capacity changes what is exchanged, not what is counted: nor do dropped choices."""
    x = tokens(24)
    free = routed(make_router(**LOSSES), x, [(24,)])
    static = routed(make_router(**LOSSES, capacity_factor=0.5, pad_to_capacity=True), x, [(24,)])
    assert static.sums[3] > 0
    assert static.sums[:3] == free.sums[:3]
    assert static.counts == free.counts


def test_megatron_4168_routers_of_rollout_and_training_disagree() -> None:
    """Recorded choices, forced, undo a change of the router's inputs; weights follow the inputs."""
    model = make("fp64", router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    run = to_device(batch((9, 4)))
    rollout, free, forced = Replay(), Replay(), Replay()
    with torch.no_grad():
        model.hidden(run.tokens, replace(model.context(run.segments), replay=rollout))
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter += 0.3 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
                )
        model.hidden(run.tokens, replace(model.context(run.segments), replay=free))
        forced.choices.update(rollout.choices)
        model.hidden(run.tokens, replace(model.context(run.segments), replay=forced))
    assert any(not torch.equal(free.choices[key], rollout.choices[key]) for key in rollout.choices)
    assert all(torch.equal(forced.choices[key], rollout.choices[key]) for key in rollout.choices)


def test_deepseek_reference_group_limit_left_under_negative_bias() -> None:
    """Masking excluded groups with 0 lets them win where all biased scores of the allowed ones are below."""
    router = make_router(expert_groups=4, top_groups=2)
    with torch.no_grad():
        router.bias -= 3
    experts = router.choose(tokens(40), Context(Segments((40,))), KEY).experts
    assert all(len({e // 2 for e in row}) <= 2 for row in experts.tolist())
