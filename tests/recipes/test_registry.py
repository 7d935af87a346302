"""Recipes are possible runs, found by name."""

import pytest

from weft.config.errors import ConfigError
from weft.recipes.registry import RECIPES, build
from weft.spec.run import RunConfig


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    config = build(name)
    assert isinstance(config, RunConfig)
    assert list(config.problems()) == []
    assert config.run.name == name
    assert build(name) == config


def test_every_full_recipe_has_a_tiny_sibling_on_one_laptop() -> None:
    full = [name for name in RECIPES if name.endswith("_pretrain")]
    assert len(full) == 6
    for name in full:
        small, large = build(f"{name}_tiny"), build(name)
        assert set(small.model.pattern) == set(large.model.pattern)
        assert small.train.global_batch_size * small.data.seq_length <= 1024
        assert small.train.precision == "fp32"


def test_published_budgets() -> None:
    nano, best = build("nemotron3_nano_30b_pretrain"), build("nemotron3_super_pretrain")
    assert nano.train.global_batch_size * nano.data.seq_length == 25_165_824
    assert nano.train.train_iters == round(25e12 / 25_165_824)
    assert (nano.optimizer.lr, nano.optimizer.min_lr) == (1e-3, 1e-5)
    assert best.scheduler.lr_warmup_iters == round(24_414_063 / 3072)
    assert best.scheduler.lr_wsd_decay_iters == round(610_351_563 / 3072)


def test_nemotron_3_nano_without_a_size_is_30b() -> None:
    assert build("nemotron3_nano_pretrain_tiny") == build("nemotron3_nano_30b_pretrain_tiny")


def test_all_four_kinds_latent_and_mtp_in_the_first_run() -> None:
    model = build("stdlib_lm").model
    assert set(model.parts.main) == set("M*-E")
    assert model.depths >= 1
    assert model.moe_latent_size > 0


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match="stdlb_lm: no recipe of this name; did you mean stdlib_lm?"):
        build("stdlb_lm")
