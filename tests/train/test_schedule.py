"""The learning rate against values computed by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.spec.run import OptimizerConfig, SchedulerConfig
from weft.train.schedule import learning_rate

OPTIMIZER = OptimizerConfig(lr=1.0, min_lr=0.1)


def rate(step: int, iters: int = 110, **settings: object) -> float:
    scheduler = SchedulerConfig(**{"lr_warmup_iters": 10, "lr_wsd_decay_iters": 40, **settings})
    return learning_rate(step, OPTIMIZER, scheduler, iters)


@pytest.mark.parametrize("style", ["WSD", "cosine", "linear", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(style):
    assert [rate(step, lr_decay_style=style) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("style", "step", "expected"),
    [
        ("constant", 11, 1.0),
        ("constant", 500, 1.0),
        ("linear", 60, 0.55),  # half of 100 steps: 0.1 + 0.9 / 2
        ("linear", 85, 0.325),  # three quarters: 0.1 + 0.9 / 4
        ("linear", 110, 0.1),
        ("linear", 111, 0.1),
        ("cosine", 35, 0.868198),  # a quarter: (1 + cos 45°) / 2 = 0.853553
        ("cosine", 60, 0.55),
        ("cosine", 110, 0.1),
        ("cosine", 300, 0.1),
    ],
)
def test_decay_from_the_end_of_the_warmup(style, step, expected):
    assert rate(step, lr_decay_style=style) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 0.775, 0.55),
        ("cosine", 0.868198, 0.55),
        ("exponential", 0.713614, 0.472792),  # 2 * 0.5^(1/4) - 1 = 0.681793, 2 * 0.5^(1/2) - 1 = 0.414214
        ("minus_sqrt", 0.55, 0.363604),  # 1 - 1/2, 1 - sqrt(1/2) = 0.292893
    ],
)
def test_wsd_is_flat_then_decays(shape, quarter, half):
    settings = {"lr_decay_style": "WSD", "lr_wsd_decay_style": shape}
    rates = [rate(step, **settings) for step in (11, 70, 80, 90, 110, 111)]
    assert rates == pytest.approx([1.0, 1.0, quarter, half, 0.1, 0.1], abs=1e-6)


def test_zero_means_the_whole_run_and_its_last_fifth():
    settings = {"lr_warmup_iters": 0, "lr_wsd_decay_iters": 0, "lr_wsd_decay_style": "linear"}
    assert [rate(step, 100, **settings) for step in (1, 80, 90, 100)] == pytest.approx([1, 1, 0.55, 0.1])


def test_the_default_decay_takes_what_a_long_warmup_leaves():
    settings = {"lr_warmup_iters": 90, "lr_wsd_decay_iters": 0, "lr_wsd_decay_style": "linear"}
    assert [rate(step, 100, **settings) for step in (90, 95, 100)] == pytest.approx([1.0, 0.55, 0.1])


def test_an_earlier_end_of_the_decay_keeps_the_final_rate():
    assert rate(51, 100, lr_decay_style="cosine", lr_decay_iters=50) == 0.1


@given(
    iters=st.integers(1, 300),
    warm=st.integers(0, 300),
    decay=st.integers(0, 300),
    style=st.sampled_from(["WSD", "cosine", "linear", "constant"]),
    shape=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
)
def test_every_schedule_rises_once_and_falls_once(iters, warm, decay, style, shape):
    warm = min(warm, iters)
    scheduler = SchedulerConfig(
        lr_decay_style=style,
        lr_warmup_iters=warm,
        lr_wsd_decay_iters=min(decay, iters - warm),
        lr_wsd_decay_style=shape,
    )
    rates = [learning_rate(step, OPTIMIZER, scheduler, iters) for step in range(1, iters + 3)]
    assert all(math.isfinite(rate) and 0 < rate <= 1.0 for rate in rates)
    top = max(warm - 1, 0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
