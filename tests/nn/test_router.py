"""One router: its losses, capacity, jitter, balance by force and replay, on one rank and on four."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from routers import (
    EXPERTS,
    KEY,
    TOP_K,
    Cut,
    Summed,
    assert_same,
    make_router,
    objective,
    plain_capacity,
    plain_loss,
    routed,
    tokens,
)  # fmt: skip

from tests.tiny import CONFIG
from weft.config.errors import RunError
from weft.config.load import read
from weft.models.hf_hybrid import read_config, write_config
from weft.nn.context import Context, Replay
from weft.nn.state import Cache
from weft.ops.segments import Segments
from weft.spec.hybrid import HybridConfig

CUTS = [Cut(1, (5, 0, 9, 10), 1), Cut(1, (13, 11), 2), Cut(2, (4, 8), 1), Cut(2, (12,), 2), Cut(1, (24,), 4)]
LOSSES = {"aux_coef": 0.7, "batch_coef": 0.4, "global_coef": 0.3, "z_coef": 0.2}


def documents(cut: Cut) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """24 tokens as documents of one run or two, and the windows of each."""
    return ([(7, 5), (3, 8, 1)], (6, 6)) if cut.dp == 2 else ([(7, 5, 3, 8, 1)], (6, 6, 6, 6))


def choose(router: Any, x: Any, lengths: tuple[int, ...], **known: Any) -> Any:
    return router.choose(x, Context(Segments(lengths), **known), KEY)


@pytest.mark.parametrize(
    ("setting", "groups"),
    [("aux_coef", [0] * 4 + [1] * 7), ("batch_coef", [0] * 11), ("global_coef", [0] * 11)],
)
def test_balance_losses_are_their_formulas(setting: str, groups: list[int]) -> None:
    router, x = make_router(**{setting: 0.6}), tokens(11)
    choice = choose(router, x, (4, 7))
    scores = (x @ router.weight.T).sigmoid()
    want = plain_loss(scores, choice.experts, groups, 0.6)
    assert choice.stats.balance.item() == pytest.approx(want.item(), rel=1e-12)
    grads = (torch.autograd.grad(loss, router.weight)[0] for loss in (choice.stats.balance, want))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_losses_add_up() -> None:
    x = tokens(11)
    together = choose(make_router(**LOSSES), x, (4, 7)).stats
    apart = [choose(make_router(**{name: value}), x, (4, 7)).stats for name, value in LOSSES.items()]
    assert together.balance.item() == pytest.approx(sum(s.balance.item() for s in apart), rel=1e-12)
    logits = x @ make_router().weight.T
    assert together.z.item() == pytest.approx(0.2 * logits.logsumexp(-1).square().sum().item(), rel=1e-12)


def test_the_global_loss_counts_the_passes_before() -> None:
    """The second pass is weighed by the choices of both, which are added up where the step keeps them."""
    router, x, seen = make_router(global_coef=0.6), tokens(20), {}
    choose(router, x[:11], (11,), tally=seen)
    second = choose(router, x[11:], (9,), tally=seen)
    everything = choose(make_router(), x, (20,))
    assert torch.equal(seen[KEY], everything.stats.counts)
    p = (x @ router.weight.T).sigmoid()
    p = p / p.sum(-1, keepdim=True)
    f = seen[KEY].double() * EXPERTS / (TOP_K * 20)
    assert second.stats.balance.item() == pytest.approx(0.6 * (f * p[11:]).sum().item(), rel=1e-12)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize(("size", "groups"), [(0, (9, 4, 11)), (4, (4, 4, 1, 4, 4, 4, 3))])
@pytest.mark.parametrize("factor", [1.0, 0.3, 1.1, 8.0])
def test_capacity_is_the_slow_loop(policy: str, size: int, groups: tuple[int, ...], factor: float) -> None:
    x = tokens(24)
    free = choose(make_router(), x, (24,))
    router = make_router(capacity_factor=factor, capacity_tokens=size, drop_policy=policy)
    choice = router.choose(x, Context(Segments((2, 22), (9, 4, 11))), KEY)
    kept = plain_capacity(free.weights, free.experts, groups, factor, policy)
    assert torch.equal(choice.experts, torch.where(kept, free.experts, -1))
    assert torch.equal(choice.weights, torch.where(kept, free.weights, 0.0))
    assert choice.stats.drop == (~kept).sum()
    assert torch.equal(choice.stats.counts, free.stats.counts)
    assert choice.bound is None


def test_equal_weights_go_by_the_order_of_tokens() -> None:
    """Also where rounding errors make them differ, as another layout's would."""
    router = make_router(capacity_factor=1.0)
    x = tokens(1).expand(8, -1) * (1 + 1e-15 * torch.arange(8, 0, -1).unsqueeze(1))
    experts = choose(router, x, (8,)).experts
    assert (experts[:3] >= 0).all()  # room for 3 of the 8 tokens that all choose the same
    assert (experts[3:] < 0).all()


def test_padded_capacity_is_what_an_expert_can_get_from_any_rank() -> None:
    router = make_router(capacity_factor=1.5, capacity_tokens=5, pad_to_capacity=True)
    choice = router.choose(tokens(24), Context(Segments((24,), (12, 12))), KEY)
    assert choice.bound == 2 * (3 + 3 + 2)  # of groups of 5, 5 and 2 tokens: ceil(2.8), ceil(2.8), ceil(1.1)
    x, (lengths, windows) = tokens(24), documents(CUTS[0])
    told = partial(routed, router, x, lengths, windows, CUTS[0], know_parts=True)
    assert told().bounds == [None] * 4  # unless ranks know the largest share of any of them
    found = told(change=lambda ctx, rank: setattr(ctx, "full", windows))
    most = [3, 0, 1 + 3 + 1 + 2, 3 + 1 + 3 + 1]  # groups of 5 and 1 tokens have room for 3 and 1
    assert found.bounds == [max(most)] * 4
    for own, limit in zip(found.experts.split(list(CUTS[0].cp)), most, strict=True):
        assert all((own == e).sum() <= limit for e in range(EXPERTS))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("know_parts", [False, True])
@pytest.mark.parametrize("size", [0, 4])
def test_ranks_route_like_one(cut: Cut, know_parts: bool, size: int) -> None:
    """Losses, capacity, jitter: tokens cut over dp, cp (unevenly, one rank without any) and tp."""
    router = make_router(**LOSSES, capacity_factor=0.8, capacity_tokens=size, jitter=0.2)
    lengths, windows = documents(cut)
    one = routed(router, tokens(24), lengths, windows)
    assert 0 < one.sums[3] < 24 * TOP_K
    assert_same(one, routed(router, tokens(24), lengths, windows, cut, know_parts=know_parts))


def test_groups_of_one_rank_are_decided_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    router, cut = make_router(capacity_factor=0.8, capacity_tokens=6), Cut(1, (12, 12), 1)
    lengths, windows = documents(cut)
    one = routed(router, tokens(24), lengths, windows)
    asked: list[str] = []
    monkeypatch.setattr(Summed, "forward", lambda self, x: asked.append(self.over) or x)
    assert_same(one, routed(router, tokens(24), lengths, windows, cut, know_parts=True))
    assert asked == []


def test_jitter_is_a_uniform_factor_of_each_input() -> None:
    router, x = make_router(jitter=0.25), tokens(3000)
    factor = router._input(x, Context(Segments((3000,))), KEY) / x
    assert (factor >= 0.75).all()
    assert (factor < 1.25).all()
    assert factor.mean().item() == pytest.approx(1, abs=0.01)
    assert factor.var().item() == pytest.approx(0.5**2 / 12, rel=0.05)
    both = torch.corrcoef(torch.cat([factor[:-1].T, factor[1:].T]))  # of features, and of neighbours
    assert (both - torch.eye(len(both))).abs().max() < 0.08


def test_jitter_depends_on_seed_layer_place_and_feature_alone() -> None:
    """A part of the tokens and features, as tp_embed gives it, gets the same factors."""
    router, x = make_router(jitter=0.25), tokens(10)
    places = torch.arange(10) * 7 + 2**33
    segments = Segments((10,))
    ctx = Context(segments, places=places, seed=1)
    whole = router._input(x, ctx, KEY)
    assert torch.equal(whole, router._input(x, Context(Segments((4, 6)), places=places, seed=1), KEY))
    for other, key in (
        (replace(ctx, seed=2), KEY),
        (replace(ctx, places=places + 1), KEY),
        (ctx, "layers.2"),
    ):
        assert (router._input(x, other, key) != whole).all()
    router.block = lambda count: (slice(2, 7), range(4, 6))
    assert torch.equal(whole[2:7, 4:6], router._input(x[2:7, 4:6], ctx, KEY))


def test_jitter_is_for_training_only() -> None:
    x, plain = tokens(10), make_router()
    with torch.no_grad():
        assert torch.equal(
            choose(make_router(jitter=0.25), x, (10,)).weights, choose(plain, x, (10,)).weights
        )
    jittered = choose(make_router(jitter=0.25), x, (10,))
    assert not torch.equal(jittered.weights, choose(plain, x, (10,)).weights)


def test_forced_balance_is_even_and_weighs_by_score() -> None:
    router, x = make_router(force_balance=True), tokens(16)
    choice = choose(router, x, (16,), places=torch.arange(100, 116))
    assert choice.experts[1].tolist() == [(101 * 3 + s) % EXPERTS for s in range(3)]
    assert choice.stats.counts.tolist() == [6] * EXPERTS
    scores = (x @ router.weight.T).sigmoid().gather(1, choice.experts)
    want = 2.5 * scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(choice.weights, want, rtol=1e-12, atol=0)
    lengths, windows = documents(CUTS[1])
    one = routed(router, tokens(24), lengths, windows)
    assert_same(one, routed(router, tokens(24), lengths, windows, CUTS[1]))


@pytest.mark.parametrize(
    "settings", [{}, {"capacity_factor": 0.6}, {"capacity_factor": 0.6, "normalize": False}]
)
def test_replay_of_what_was_recorded_is_the_same_run(settings: dict[str, Any]) -> None:
    """Also with dropped choices, which have a share in the sum that normalizes the weights."""
    router, x = make_router(**settings, **LOSSES), tokens(11)
    recorded = Replay()
    first = choose(router, x, (4, 7), replay=recorded)
    with torch.no_grad():
        router.bias.zero_()  # choices would be others
    again = choose(router, x, (4, 7), replay=Replay({KEY: recorded.choices[KEY].to(torch.int16)}))
    assert torch.equal(first.experts, again.experts)
    assert torch.equal(first.weights, again.weights)
    for one, other in zip(first.stats, again.stats, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_replay_of_no_expert() -> None:
    router, x = make_router(), tokens(3)
    given = torch.tensor([[0, -1, 2], [-1, -1, -1], [7, 6, 5]])
    choice = choose(router, x, (3,), replay=Replay({KEY: given}))
    assert torch.equal(choice.experts, given)
    assert (choice.weights[given < 0] == 0).all()
    assert choice.weights[0].sum().item() == pytest.approx(2.5, rel=1e-12)
    assert choice.stats.counts.tolist() == [1, 0, 1, 0, 0, 1, 1, 1]
    assert choice.stats.drop == 0
    (choice.weights.square().sum() + choice.stats.z).backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), r"layers\.1 have shape \(4, 3\), not \(5, 3\)"),
        (torch.zeros(5, 2, dtype=torch.int64), r"have shape \(5, 2\), not \(5, 3\)"),
        (torch.tensor([[0, 1, 8]] * 5), "name expert 8, but there are 8"),
        (torch.tensor([[0, 1, -10]] * 5), "name expert 8, but there are 8"),
        (torch.tensor([[4, 1, 4]] * 5), "name an expert twice"),
    ],
)
def test_choices_that_do_not_fit_are_refused(given: torch.Tensor, message: str) -> None:
    with pytest.raises(RunError, match=message):
        choose(make_router(), tokens(5), (5,), replay=Replay({KEY: given}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{}, {"capacity_factor": 0.5}, {"expert_groups": 4, "top_groups": 2}])
def test_logits_that_are_not_finite_choose_real_experts_and_are_told(value: float, settings: dict) -> None:
    router, x = make_router(**settings), tokens(9)
    x[4, 2] = value
    choice = choose(router, x, (9,))
    assert choice.experts.min() >= -1
    assert choice.experts.max() < EXPERTS
    assert choice.stats.entropy.isnan()
    assert not choose(router, tokens(9), (9,)).stats.entropy.isnan()
    router.weight.data[3] = value
    assert choose(router, tokens(9), (9,)).experts.max() < EXPERTS


def test_no_tokens() -> None:
    router = make_router(**LOSSES, capacity_factor=0.5, jitter=0.1, pad_to_capacity=True)
    for lengths in ((), (0,)):
        choice = choose(router, tokens(0), lengths)
        assert choice.experts.shape == (0, TOP_K)
        assert not choice.bound
        objective(choice, tokens(0)).backward()


def test_nothing_is_dropped_while_generating() -> None:
    """What a token gets must not depend on tokens after it, or on how many are read at a time."""
    router = make_router(capacity_factor=0.2, pad_to_capacity=True)
    choice = choose(router, tokens(9), (9,), cache=Cache({}, [0]))
    assert (choice.experts >= 0).all()
    assert choice.bound is None
    assert choice.stats is None


def test_recomputation_asks_no_other_rank_again(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x = make_router(**LOSSES, capacity_factor=0.6, jitter=0.1), tokens(11)
    seen: dict[str, torch.Tensor] = {}
    ctx = Context(Segments((4, 7)), tally=seen)
    first = choose_with(router, x, ctx)
    counted = seen[KEY].clone()
    monkeypatch.setattr(type(router.total), "forward", lambda self, x: pytest.fail("asked again"))
    again = choose_with(router, x, ctx)
    assert torch.equal(seen[KEY], counted)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def choose_with(router: Any, x: torch.Tensor, ctx: Context) -> list[torch.Tensor]:
    """Outcome and gradient."""
    choice = router.choose(x, ctx, KEY)
    (grad,) = torch.autograd.grad(objective(choice, x), router.weight)
    return [choice.weights, choice.experts, grad, *choice.stats]


def test_published_configurations_know_nothing_of_these_settings() -> None:
    """They come with our defaults and leave no trace in what is written."""
    changed = replace(
        CONFIG,
        router_batch_aux_loss_coef=0.1,
        router_global_aux_loss_coef=0.1,
        moe_capacity_factor=1.25,
        moe_capacity_tokens=64,
        moe_drop_policy="position",
        moe_pad_to_capacity=True,
        moe_jitter=0.01,
        moe_force_balance=True,
    )
    assert write_config(changed) == write_config(CONFIG)
    found, problems = read_config(write_config(changed))
    assert found
    assert not problems
    assert found.router == replace(CONFIG.router, aux_coef=1e-4, z_coef=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_capacity_factor": -1}, "moe_capacity_factor: -1.* out of range; it must be at least 0"),
        ({"moe_capacity_tokens": 64}, "moe_capacity_tokens: 64 without a capacity; set moe_capacity_factor"),
        ({"moe_pad_to_capacity": True}, "moe_pad_to_capacity: True without a capacity; set moe_capacity"),
        ({"moe_capacity_factor": 1, "moe_capacity_tokens": -2}, "moe_capacity_tokens: -2 is out of range"),
        ({"moe_jitter": 1.0}, "moe_jitter: 1.0 is out of range; it must be at least 0 and less than 1"),
        ({"moe_drop_policy": "random"}, "moe_drop_policy"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 experts per token, but there are only 8"),
        ({"router_global_aux_loss_coef": -0.1}, "router_global_aux_loss_coef: -0.1 is out of range"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    known = {"pattern": "E", "hidden_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3}
    _, problems = read(HybridConfig, known | settings)
    assert any(re.match(message, str(problem)) for problem in problems), [str(p) for p in problems]
