"""Layers, overrides, and where every value is from."""

from pathlib import Path

import pytest

from weft.config.errors import ConfigError
from weft.config.load import to_yaml
from weft.config.resolve import Resolved, file_layer, override_layer, resolve
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.run import RunConfig


def layered(*overrides: str, file: Path | None = None) -> Resolved[RunConfig]:
    layers = [file_layer(file)] if file else []
    return resolve(stdlib_lm(), [*layers, override_layer(RunConfig, overrides)], "recipe stdlib_lm")


def refused(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        layered(*overrides, file=file)
    return str(caught.value)


def test_no_layers_change_nothing() -> None:
    got = layered()
    assert got.config == stdlib_lm()
    assert got.origins["model.pattern"] == "recipe stdlib_lm"
    assert got.origins["optimizer.eps"] == "default"
    assert set(got.origins.values()) == {"default", "recipe stdlib_lm"}


def test_command_line_over_file_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  train_iters: 500\n  micro_batch_size: 4\n\nmodel: {time_step_limit: [0, 1]}\n")
    got = layered("train.train_iters=600", "data.tokenizer.vocab_size=1_000", file=file)
    assert (got.config.train.train_iters, got.config.train.micro_batch_size) == (600, 4)
    assert got.config.model.time_step_limit == (0.0, 1.0)
    assert got.origins["train.train_iters"] == "command line"
    assert got.origins["train.micro_batch_size"] == "run.yaml:3"
    assert got.origins["model.time_step_limit"] == "run.yaml:5"
    assert got.origins["data.tokenizer.vocab_size"] == "command line"


def test_a_value_equal_to_the_default_still_names_its_layer() -> None:
    assert layered("optimizer.eps=1e-8").origins["optimizer.eps"] == "command line"


def test_a_written_config_resolves_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(layered("run.seed=7", "run.name=010").config))
    got = layered(file=file)
    assert got.config == layered("run.seed=7", "run.name=010").config
    assert all(origin.startswith("config.yaml:") for origin in got.origins.values())


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name=2026", "2026"),
        ("run.name=a b #c", "a b #c"),
        ("run.name='quoted'", "quoted"),
        ("run.name=", ""),
        ("run.name=a=b", "a=b"),
        ("run.name=true", "true"),
        ("run.name=*.py", "*.py"),
    ],
)
def test_text_is_taken_as_it_is(override: str, value: str) -> None:
    assert layered(override).config.run.name == value


def test_later_overrides_win() -> None:
    assert layered("run.seed=1", "run.seed=2").config.run.seed == 2


def test_problems_name_their_line_and_come_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  train_iters: many\noptimiser: {lr: 1}\nmodel:\n  pattern: MXE\n")
    said = refused("oops", "run.seed=-1", "model=other.yaml", "train.recompute=[", file=file).splitlines()
    assert said[0] == "7 problems in the configuration:"
    assert said[1] == "  oops: expected section.name=value, for example train.train_iters=100"
    assert said[2].startswith(
        "  model: is a section, not 'other.yaml'; set model.<name>=value, or a whole file"
    )
    assert said[3].startswith("  train.recompute: line 1: not valid YAML")
    assert said[4] == "  optimiser: unknown name; did you mean optimizer? (run.yaml:3)"
    assert said[5].endswith("expected a whole number of at least 1, not 'many' (run.yaml:2)")
    assert said[6] == "  run.seed: -1 is out of range; it must be at least 0 (command line)"
    assert said[7].startswith("  model.pattern: unknown letter 'X' at position 1 of 'MXE'")
    assert said[7].endswith("(run.yaml:5)")


def test_a_missing_file_and_a_bad_override_are_both_named() -> None:
    said = refused("run.sed=1", file=Path("absent.yaml"))
    assert "absent.yaml: cannot be read" in said
    assert "did you mean run.seed?" in said
