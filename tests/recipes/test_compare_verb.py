"""``weft compare RECIPE --plan A --plan B``: the table, the verdict, the exit status, what comes next."""

from pathlib import Path
from typing import Any

import pytest

from weft.models.hybrid import HybridLM
from weft.recipes.cli import main
from weft.recipes.compare_verb import parse_side
from weft.recipes.registry import build
from weft.train import trace

RECIPE = ("compare", "nemotron3_nano_30b_pretrain_tiny", "data.seq_length=16", "model.pattern=ME*")


def test_equal_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("decoder: {tp: 2, store: {level: 1}}\n")
    assert main([*RECIPE, "--plan", "one", "--plan", f"{file} ranks=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["plan A: one (1 rank)", f"plan B: {file} ranks=4 (4 ranks)"]
    rows = {words[0]: words[1:] for words in map(str.split, lines) if words}
    assert rows["unit"] == ["weights", "forward", "backward", "gradients"]
    assert [rows[f"layers.{i}"][0] for i in range(3)] == ["0.0e+00"] * 3
    assert all(float(word) < 1e-12 for word in rows["layers.1"])
    assert "they agree: no tensor differs by more than 1e-10 of its largest value" in lines
    assert lines[-1] == (
        f"  torchrun --nproc-per-node=4 -m weft train {' '.join(RECIPE[1:3])} 'model.pattern=ME*' "
        "plan.decoder.tp=2 plan.decoder.store.level=1"
    )


def test_a_fault_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trace.assemble

    def assemble(*arguments: Any) -> HybridLM:
        model, mesh = whole(*arguments), arguments[-1]
        if mesh.rank == 1:
            slot = model.layers["2"].mixer.o_proj.product
            plain = slot.forward
            slot.forward = lambda *given: 3 * plain(*given)
        return model

    monkeypatch.setattr(trace, "assemble", assemble)
    assert main([*RECIPE, "--mock", "--plan", "one", "--plan", "plan.decoder.tp=2 decoder.dp=2"]) == 1
    out = capsys.readouterr().out
    assert "they differ, first in forward: layers.2, mixer.o_proj, rank 1 of plan B\n" in out
    assert "(rank 1, rows 8 to 15, columns 0 to" in out
    assert "what comes before agrees; nearest is layers.2 mixer.o_proj.input, to " in out
    commands = out.partition("next:\n")[2].splitlines()
    assert [command.partition("--plan one --plan ")[2] for command in commands] == [
        "decoder.dp=2",
        "decoder.tp=2",
    ]


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (["one"], "--plan: 1 given, but two are compared"),
        (["one", "ranks=x"], "ranks: 'x' is not a number of ranks"),
        (["one", "decoder.tp=5"], "plan.decoder.tp: "),
        (["one", "ranks=4 decoder.ranks=0-1"], "rank 2 has nothing to do"),
        (["one", "missing.yaml"], "there is no file missing.yaml"),
        (["one", "decoder.rows=2"], "plan.decoder.rows: unknown name"),
    ],
)
def test_wrong_plans(plans: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for plan in plans for word in ("--plan", plan)]
    assert main([*RECIPE, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_needs_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE]) == 2
    assert "name HF_DIR and CKPT, or a recipe and two --plan" in capsys.readouterr().err


def test_ranks_follow_from_the_sizes() -> None:
    run = build("stdlib_lm")
    assert parse_side("one", run).ranks == 1
    assert parse_side("decoder.tp=2 decoder.dp=3", run).ranks == 6
    assert parse_side("decoder.tp=2 ranks=8", run).readers == 4


def test_data_that_is_not_tokenized_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some words " * 100)
    words = [f"data.source={folder}", f"data.cache={tmp_path / 'cache'}", "data.tokenizer.vocab_size=300"]
    words += ["--precision", "fp32"]
    assert main([*RECIPE, *words, "--plan", "one", "--plan", "decoder.dp=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("random tokens: the data is not tokenized yet ('weft data build' does it)\n")
    assert list((tmp_path / "cache").iterdir()) == []
