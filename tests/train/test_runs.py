"""Whole runs of tiny recipes: resume equals uninterrupted, every file is there, bad starts are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.runs import STEPS, bits_after, small, tensors
from weft.checkpoint.hf import import_hf
from weft.checkpoint.load import open_checkpoint
from weft.config.errors import CheckpointError, ConfigError, DataError
from weft.recipes.registry import build
from weft.train.metrics import read_rows
from weft.train.run import train

TIMES = ("seconds", "tokens_per_second", "mfu", "memory_gib")


@pytest.fixture
def reported() -> None:
    """For tests that want the report of a run."""


@pytest.fixture(autouse=True)
def brief(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a report take longer than all else in such a run."""
    if "reported" not in request.fixturenames:
        monkeypatch.setattr("weft.train.run.write_report", lambda directory: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, precision: str) -> None:
    recipe = build("nemotron3_super_pretrain_tiny")
    recipe = replace(recipe, train=replace(recipe.train, precision=precision))
    whole = bits_after(tmp_path / "whole", recipe, "cpu", stop=None)
    resumed = bits_after(tmp_path / "cut", recipe, "cpu", stop=3)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    again = read_rows(tmp_path / "cut-resumed" / "metrics.jsonl")
    for row in [*rows, *again]:
        for key in TIMES:
            row.pop(key)
    assert again == rows[3:]


def test_auto_resumes_this_run_and_keeps_one_row_a_step(tmp_path: Path) -> None:
    recipe = build("nemotron3_nano_30b_pretrain_tiny")
    config = small(tmp_path / "run", recipe, load="auto", most_recent_k=0)
    train(config, {})
    longer = replace(config, train=replace(config.train, train_iters=STEPS + 2))
    train(longer, {})
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, STEPS + 3))
    assert open_checkpoint(tmp_path / "run").step == STEPS + 2


def test_asynchronous_saves_hold_the_same_bits(tmp_path: Path) -> None:
    recipe = build("nemotron3_nano_30b_pretrain_tiny")
    train(small(tmp_path / "a", recipe), {})
    train(small(tmp_path / "b", recipe, async_save=True), {})
    here, there = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("recompute", [False, True])
def test_microbatches_and_recomputation_do_not_change_the_run(tmp_path: Path, recompute: bool) -> None:
    recipe = build("nemotron3_super_pretrain_tiny")
    losses = []
    for micro, again in ((2, False), (4, recompute)):
        config = small(tmp_path / f"{micro}{again}", recipe)
        settings = replace(config.train, micro_batch_size=micro, precision="fp64", recompute=again)
        train(replace(config, train=settings), {})
        losses.append([row["loss"] for row in read_rows(tmp_path / f"{micro}{again}" / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


@pytest.mark.usefixtures("reported")
def test_what_a_run_leaves(tmp_path: Path) -> None:
    where = train(small(tmp_path / "run", build("nemotron3_super_pretrain_tiny")), {"run.seed": "default"})
    files = {path.name for path in where.iterdir()}
    assert {"config.yaml", "origins.json", "environment.json", "metrics.jsonl", "summary.json"} <= files
    assert {"report.html", "checkpoints", "export"} <= files
    summary = json.loads((where / "summary.json").read_text())
    assert summary["params"] == sum(
        spec.numel for spec in build("nemotron3_super_pretrain_tiny").model.params()
    )
    rows = read_rows(where / "metrics.jsonl")
    assert {"loss", "lm_loss", "mtp_loss", "aux_loss", "grad_norm", "lr", "tokens", "expert_load"} <= set(
        rows[0]
    )


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(small(tmp_path / "one", build("nemotron3_nano_30b_pretrain_tiny")), {})
    other = small(tmp_path / "two", build("nemotron3_super_pretrain_tiny"), load=str(tmp_path / "one"))
    with pytest.raises(CheckpointError, match="another model"):
        train(other, {})


def test_plan_that_does_not_fit(tmp_path: Path) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"))
    plan = replace(config.plan, decoder=replace(config.plan.decoder, tp=2))
    with pytest.raises(ConfigError, match="does not divide the 1 rank"):
        train(replace(config, plan=plan), {})


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"))
    with pytest.raises((DataError, ConfigError), match="empty"):
        train(replace(config, data=replace(config.data, source=str(tmp_path / "empty"))), {})


def test_an_imported_model_is_trained_on(tmp_path: Path) -> None:
    recipe = build("nemotron3_nano_30b_pretrain_tiny")
    first = train(small(tmp_path / "first", recipe), {})
    imported = tmp_path / "imported"
    import_hf(first / "export", imported)
    started = replace(small(tmp_path / "second", recipe, load=str(imported)))
    train(started, {})
    row = read_rows(tmp_path / "second" / "metrics.jsonl")[0]
    fresh = read_rows(first / "metrics.jsonl")[0]
    assert row["step"] == 1
    assert row["loss"] < fresh["loss"]  # the same batch, after training


def test_a_finished_run_started_again_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"), load="auto")
    train(config, {})
    before = tensors(tmp_path / "run")
    train(config, {})
    assert "nothing left to train" in capsys.readouterr().out
    after = tensors(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_later_steps_in_the_way_are_found_before_training(tmp_path: Path) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"))
    train(config, {})
    with pytest.raises(CheckpointError, match="already holds step 6"):
        train(config, {})


def test_a_resumed_run_keeps_its_tokenizer_when_the_corpus_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"the text of document {number} says little. " * 40)
    base = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"), load="auto")
    tokenizer = replace(base.data.tokenizer, vocab_size=300)
    config = replace(
        base, data=replace(base.data, source=str(corpus), tokenizer=tokenizer, valid_fraction=0.2)
    )
    where = train(config, {})
    before = (where / "tokenizer" / "tokenizer.json").read_text()
    for number in range(12, 16):
        (corpus / f"{number}.txt").write_text("quite other words: zebra, quartz, fjord! " * 60)
    longer = replace(config, train=replace(config.train, train_iters=STEPS + 2))
    train(longer, {})
    assert (where / "tokenizer" / "tokenizer.json").read_text() == before
    assert "changed since then: train.train_iters: 6 -> 8" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(where / "metrics.jsonl")] == list(range(1, STEPS + 3))


def test_another_precision_is_refused(tmp_path: Path) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"), load="auto")
    train(config, {})
    other = replace(config, train=replace(config.train, precision="bf16", train_iters=STEPS + 1))
    with pytest.raises(CheckpointError, match="set train.precision=fp32"):
        train(other, {})


@pytest.mark.usefixtures("reported")
def test_a_model_that_cannot_be_exported_still_has_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"))
    config = replace(config, model=replace(config.model, moe_shared_expert_intermediate_size=0))
    where = train(config, {})
    assert (where / "report.html").is_file()
    assert not (where / "export").exists()
    assert "no Hugging Face export of this run" in capsys.readouterr().out


@pytest.mark.usefixtures("reported")
def test_a_failed_export_loses_neither_summary_nor_report(tmp_path: Path) -> None:
    config = small(tmp_path / "run", build("nemotron3_nano_30b_pretrain_tiny"))
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="export"):
        train(config, {})
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "export" / "precious.txt").read_text() == "mine"
