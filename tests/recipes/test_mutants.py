"""Forty wrong configurations: all refused, each with its path and the fix."""

import pytest

from weft.config.errors import ConfigError
from weft.config.resolve import Layer, override_layer, resolve
from weft.recipes.registry import build
from weft.spec.run import RunConfig

SUPER = "nemotron3_super_pretrain_tiny"

# (override of stdlib_lm, path that is named, words that must follow)
MUTANTS = [
    # names: typing errors
    ("train.train_iter=10", "train.train_iter", "did you mean train.train_iters?"),
    ("train.globl_batch_size=8", "train.globl_batch_size", "did you mean train.global_batch_size"),
    ("optimizer.beta_1=0.9", "optimizer.beta_1", "optimizer.beta1"),
    ("optimiser.lr=1e-3", "optimiser", "did you mean optimizer?"),
    ("modl.hidden_size=64", "modl", "did you mean model?"),
    ("model.hiden_size=64", "model.hiden_size", "did you mean model.hidden_size"),
    ("data.tokeniser.vocab_size=512", "data.tokeniser", "did you mean data.tokenizer?"),
    ("data.tokenizer.vocab=512", "data.tokenizer.vocab", "did you mean data.tokenizer.vocab_size?"),
    ("scheduler.lr_warmup_iter=3", "scheduler.lr_warmup_iter", "did you mean scheduler.lr_warmup_iters?"),
    ("checkpoint.save_intervall=3", "checkpoint.save_intervall", "did you mean checkpoint.save_interval?"),
    # names: of another section, or of other programs and times
    ("train.lr=1e-3", "train.lr", "did you mean optimizer.lr?"),
    ("train.seq_length=64", "train.seq_length", "did you mean data.seq_length?"),
    ("seed=3", "seed", "did you mean run.seed?"),
    ("model.hybrid_override_pattern=ME*", "model.hybrid_override_pattern", "did you mean model.pattern?"),
    ("validation.train_iters=3", "validation.train_iters", "did you mean train.train_iters"),
    ("model.num_layers=3", "model.num_layers", "unknown name"),
    # types
    ("train.train_iters=many", "train.train_iters", "expected a whole number of at least 1, not 'many'"),
    ("train.train_iters=1e6", "train.train_iters", "write 1000000"),
    ("train.train_iters=1.5", "train.train_iters", "expected a whole number of at least 1, not 1.5"),
    ("train.recompute=yes", "train.recompute", "expected true or false, not 'yes'"),
    ("train.recompute=1", "train.recompute", "expected true or false, not 1"),
    ("optimizer.lr=fast", "optimizer.lr", "expected a number of more than 0, not 'fast'"),
    ("optimizer.lr=", "optimizer.lr", "expected a number of more than 0, not nothing"),
    ("model.time_step_limit=0.1", "model.time_step_limit", "expected a list such as [a, b], not 0.1"),
    ("model.time_step_limit=[0, 1, 2]", "model.time_step_limit", "expected 2 values, not 3"),
    ("model=nano.yaml", "model", "is a section, not 'nano.yaml'"),
    # allowed values
    ("train.precision=fp16", "train.precision", "expected one of fp64, fp32, bf16, not 'fp16'"),
    (
        "scheduler.lr_decay_style=wsd",
        "scheduler.lr_decay_style",
        "one of WSD, cosine, linear, constant, not 'wsd'",
    ),
    ("data.encoding_errors=ignore", "data.encoding_errors", "expected one of error, skip, not 'ignore'"),
    ("run.device=gpu", "run.device", "expected one of auto, cpu, cuda, not 'gpu'"),
    # ranges
    ("train.train_iters=0", "train.train_iters", "0 is out of range; it must be at least 1"),
    ("optimizer.lr=-1e-3", "optimizer.lr", "-0.001 is out of range; it must be more than 0"),
    ("optimizer.beta2=1", "optimizer.beta2", "1.0 is out of range; it must be at least 0 and less than 1"),
    ("optimizer.lr=.inf", "optimizer.lr", "inf is not a finite number"),
    ("model.n_groups=0", "model.n_groups", "0 is out of range; it must be at least 1"),
    # clashes
    ("optimizer.min_lr=1", "optimizer.min_lr", "is above optimizer.lr"),
    (
        "model.num_key_value_heads=3",
        "model.num_key_value_heads",
        "3 key/value heads do not divide 4 query heads",
    ),
    (
        "model.num_experts_per_tok=99",
        "model.num_experts_per_tok",
        "99 experts per token, but there are only 16",
    ),
    ("model.pattern=MEX*", "model.pattern", "unknown letter 'X' at position 2 of 'MEX*'; use 'M' Mamba-2"),
    ("model.pattern=/*E", "model.pattern", "has no main layers"),
    ("data.source=", "data.source", "name a source (data.source=stdlib)"),
    ("model.vocab_size=300", "data.tokenizer.vocab_size", "do not fit model.vocab_size = 300"),
    ("train.train_iters=3", "scheduler.lr_warmup_iters", "exceed the schedule's 3 steps"),
]


def problems_of(recipe: str, *overrides: str, file: Layer | None = None) -> list[str]:
    layers = [file] if file else []
    with pytest.raises(ConfigError) as caught:
        resolve(build(recipe), [*layers, override_layer(RunConfig, overrides)], f"recipe {recipe}")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(("override", "path", "words"), MUTANTS)
def test_refused_with_path_and_fix(override: str, path: str, words: str) -> None:
    (problem,) = problems_of("stdlib_lm", override)
    assert problem.startswith(f"{path}: ")
    assert words in problem


def test_there_are_forty() -> None:
    assert len({override for override, _, _ in MUTANTS}) >= 40


def test_all_at_once() -> None:
    """Mutants of different settings do not hide one another; a clash waits until its section can be read."""
    sections = {"optimiser", "data", "scheduler", "run", "checkpoint"}
    chosen = [m for m in MUTANTS if m[0].split(".")[0] in sections and m[0] != "data.source="]
    assert len(chosen) > 6
    found = "\n".join(problems_of("stdlib_lm", *(override for override, _, _ in chosen)))
    for _, path, words in chosen:
        assert path in found
        assert words in found


def test_more_depths_than_the_pattern_has() -> None:
    (problem,) = problems_of("stdlib_lm", "model.pattern=ME*-", "model.mtp_num_depths=2")
    assert problem.startswith("model.mtp_num_depths: 2 depths, but the pattern has no '/' part")
    (problem,) = problems_of(SUPER, "model.pattern=ME*/*E/*E", "model.mtp_num_depths=3")
    assert problem.startswith("model.mtp_num_depths: 3 depths need one '/' part (repeated) or 3 of them")


def test_the_wsd_decay_counts_only_for_wsd() -> None:
    cosine = ["scheduler.lr_decay_style=cosine", "scheduler.lr_wsd_decay_iters=100000"]
    layer = override_layer(RunConfig, cosine)
    assert resolve(build("stdlib_lm"), [layer], "recipe").config.scheduler.lr_decay_style == "cosine"
    (problem,) = problems_of("stdlib_lm", *cosine, "train.train_iters=3")
    assert problem.startswith("scheduler.lr_warmup_iters: warm-up (")
    assert problem.endswith("exceeds the schedule's 3 steps; shorten it")


def test_a_problem_of_a_layer_is_told_once_under_the_name_users_set() -> None:
    assert len(problems_of("stdlib_lm", "model.hidden_size=0")) == 1
    (problem,) = problems_of("stdlib_lm", "model.mamba_num_heads=3")
    assert problem.startswith("model.n_groups: 2 groups do not divide 3 Mamba heads")
