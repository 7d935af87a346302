"""``weft plan``, and plans of ``weft train``: settings, files, origins, messages, speed, no torch."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.config.errors import ConfigError
from weft.config.load import from_dict, from_yaml, to_dict, to_yaml
from weft.config.resolve import Resolved, override_layer, resolve
from weft.recipes.cli import main
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig

ROOT = Path(__file__).parents[2]
COLOCATED = """\
decoder: {ranks: 0-7, tp: 2, shard: {heads: tp, mlp: tp, vocab: tp}, store: {level: 3, over: [dp, cp]}}
experts: {ep: 8}
"""
# Runs the command in a process that ends with a word on stderr if a module was imported.
WATCH = """
import sys
from weft.recipes.cli import main
status = main(sys.argv[1:])
print([name for name in ("torch", "rich") if name in sys.modules], file=sys.stderr)
raise SystemExit(status)
"""


def run_with(*overrides: str) -> Resolved[RunConfig]:
    return resolve(stdlib_lm(), [override_layer(RunConfig, overrides)], "recipe stdlib_lm")


def test_dotted_overrides() -> None:
    words = "plan.decoder.tp=2 plan.decoder.store.level=3 plan.decoder.ranks=0-3 plan.decoder.shard.mlp=none"
    got = run_with(*words.split(), "plan.decoder.store.over=[dp,cp]")
    decoder = got.config.plan.decoder
    assert (decoder.tp, decoder.store.level, decoder.ranks) == (2, 3, "0-3")
    assert (decoder.shard, decoder.store.over) == ({"mlp": "none"}, ("dp", "cp"))
    assert got.origins["plan.decoder.store.level"] == "command line"
    assert got.origins["plan.decoder.dp"] == "default"


def test_a_file_is_the_whole_section(tmp_path: Path) -> None:
    file = tmp_path / "colocated.yaml"
    file.write_text(COLOCATED)
    got = run_with("plan.decoder.cp=2", f"plan={file}", "plan.decoder.tp=4")
    decoder = got.config.plan.decoder
    assert (decoder.tp, decoder.cp, decoder.store.over, got.config.plan.experts.ep) == (4, 1, ("dp", "cp"), 8)
    assert got.origins["plan.decoder.tp"] == "command line"
    assert got.origins["plan.decoder.shard.heads"] == "colocated.yaml:1"
    assert got.origins["plan.experts.ep"] == "colocated.yaml:2"
    assert got.origins["plan.decoder.cp"] == "default"


def test_a_wrong_file_is_blamed_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text("decoder:\n  t_p: 2\n  tp: two\nscheduel: {kind: 1f1b}\n")
    with pytest.raises(ConfigError) as caught:
        run_with(f"plan={file}")
    assert [str(problem) for problem in caught.value.problems] == [
        "plan.decoder.t_p: unknown name; did you mean plan.decoder.tp? (wrong.yaml:2)",
        "plan.decoder.tp: expected a whole number of at least 1, not 'two' (wrong.yaml:3)",
        "plan.scheduel.kind: unknown name; did you mean plan.schedule.kind? (wrong.yaml:4)",
    ]


def test_a_missing_file() -> None:
    with pytest.raises(
        ConfigError, match=r"plan: is a section, not 'absent.yaml'; .*there is no file absent"
    ):
        run_with("plan=absent.yaml")


def test_runs_written_before_plans_load_with_one_process() -> None:
    values = to_dict(stdlib_lm())
    del values["plan"]
    assert from_dict(RunConfig, values).plan == PlanConfig()


def watched(*arguments: str) -> tuple[int, str, str, float]:
    start = time.monotonic()
    command = [sys.executable, "-c", WATCH, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


@pytest.mark.parametrize(
    "words",
    [
        "plan.decoder.tp=8 plan.decoder.tp_embed=2 plan.decoder.store.level=3",
        "plan.decoder.tp=8 plan.decoder.pp=4 plan.experts.ep=64 plan.decoder.store.level=1",
    ],
)
def test_four_thousand_ranks_at_once_without_torch(words: str) -> None:
    arguments = ["plan", "nemotron3_super_pretrain", "--ranks", "4096", *words.split(), "--show"]
    status, out, err, seconds = watched(*arguments)
    assert (status, err) == (0, "[]\n")
    assert seconds < 5
    assert "decoder: 4,096 ranks" in out
    assert "mixer.experts.up_proj" in out


def test_the_default_is_a_summary_and_the_next_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "stdlib_lm", "--ranks", "4", "plan.decoder.tp=2"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[:4]] == [
        ["ranks", "4"],
        ["decoder", "dp", "2", "x", "tp", "2"],
        ["experts", "edp", "4"],
        ["store", "level", "0"],
    ]
    assert out.endswith(
        "next:\n  weft plan stdlib_lm plan.decoder.tp=2 --ranks 4 --show\n"
        "  torchrun --nproc-per-node=4 -m weft train stdlib_lm plan.decoder.tp=2\n"
    )


@pytest.mark.parametrize("verb", [["plan", "--ranks", "8"], ["train"], ["train", "--dry-run"]])
def test_a_plan_that_does_not_fit(
    verb: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main([*verb, "stdlib_lm", "plan.decoder.tp=8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "weft: 2 problems in the configuration:",
        "  plan.decoder.tp: 8 ranks do not divide heads = 4 (model.mamba_num_heads); "
        "tp can be 1, 2 or 4 (command line)",
        "  plan.decoder.tp: 8 ranks do not divide heads = 4 (model.num_attention_heads); "
        "tp can be 1, 2 or 4 (command line)",
    ]


def test_training_refuses_what_is_only_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stdlib_lm", "--ranks", "2", "plan.decoder.tp=2", "plan.decoder.shard={vocab: none}"]
    assert main(["plan", *words]) == 0
    assert "planned, not run by this version:\n  plan.decoder.shard.vocab: " in capsys.readouterr().out


def test_a_rank_without_a_module_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "stdlib_lm", "--ranks", "4", "plan.decoder.ranks=0-1"]) == 2
    assert "plan.decoder.ranks: rank 2 has nothing to do; start 2 ranks, " in capsys.readouterr().err


def test_encoders_have_rows_of_their_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing = tmp_path / "step.svg"
    plan = ["plan", "digits_vlm", "--ranks", "4", f"plan={ROOT / 'plans' / 'digits_overlapping.yaml'}"]
    assert main([*plan, "train.freeze=[vision.projector]", "--timeline", str(drawing)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "vision    pp 2 on ranks 0-1, 193,088 parameters, not trained: projector",
        "decoder   dp 3 on ranks 1-3",
    ]
    assert "seats: 0 is rank 1; 1 is ranks 2-3; 2 is rank 0" in drawing.read_text()


def test_training_stops_before_torch() -> None:
    status, out, err, _ = watched("train", "stdlib_lm", "plan.decoder.tp=2")
    assert (status, out) == (2, "")
    assert "plan.decoder.tp: tp 2 does not divide the 1 ranks; " in err
    assert err.endswith("[]\n")


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "stdlib_lm", "--dry-run", "plan.decoder.tp=2"]) == 0
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["plan.decoder.tp", "2", "command", "line"] in out
    assert ["decoder", "tp", "2"] in out
    assert out[-1] == shlex.split("torchrun --nproc-per-node=2 -m weft train stdlib_lm plan.decoder.tp=2")


def test_difference_picture_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, kept, drawn = tmp_path / "b.yaml", tmp_path / "plans" / "a.yaml", tmp_path / "a.svg"
    other.write_text("decoder: {tp: 4}\n")
    words = ["plan", "stdlib_lm", "--ranks", "4", "plan.decoder.tp=2", "plan.decoder.store.level=1"]
    assert main([*words, "--diff", str(other), "--save", str(kept), "--picture", str(drawn)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["decoder.tp", "2", "4"] in lines
    assert ["decoder.store.level", "1", "0"] in lines
    assert any(line[:4] == ["received", "by", "all", "ranks"] for line in lines)
    assert from_yaml(PlanConfig, kept.read_text()) == run_with(*words[4:]).config.plan
    assert drawn.read_text().startswith("<svg")
    assert out.endswith(f"torchrun --nproc-per-node=4 -m weft train stdlib_lm plan={kept}\n")
    assert main(["plan", "stdlib_lm", "--ranks", "4", f"plan={kept}", "--diff", str(kept)]) == 0
    assert "the other plan is the same" in capsys.readouterr().out


def test_a_pipeline_in_a_row_and_as_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan.decoder.pp=2 plan.schedule.kind=zbv train.micro_batch_size=1 train.global_batch_size=8"
    file = tmp_path / "drawn" / "timeline.svg"
    assert main(["plan", "stdlib_lm", "--ranks", "2", *words.split(), "--timeline", str(file)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("schedule"))
    assert row.startswith("schedule  zbv, 4 stages on 2 ranks, 8 microbatches, bubble ")
    assert f"timeline drawn in {file}\n" in out
    assert "simulated by FLOPs: zbv" in file.read_text()


DEADLOCK = "F(0,0) B(0,0) W(0,0) F(0,1) B(0,1) W(0,1)\nF(1,0) F(1,1) B(1,0) W(1,0) B(1,1) W(1,1)\n"


def test_ranks_that_would_wait_for_each_other_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, picture = tmp_path / "lists.txt", tmp_path / "cycle.svg"
    file.write_text(DEADLOCK)
    words = f"plan.decoder.pp=2 plan.schedule.kind=file plan.schedule.file={file} "
    words += "train.micro_batch_size=1 train.global_batch_size=2"
    command = ["plan", "stdlib_lm", "--ranks", "2", *words.split()]
    assert main(command) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[1] == "  plan.schedule.file: ranks wait for each other:"
    assert err[2].startswith("      rank 0 WAIT(0<1,0)")
    draw = f"    draw them: weft plan stdlib_lm {words} --ranks 2 --picture cycle.svg"
    assert err[-1] == draw
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "stdlib_lm", *words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == draw
    assert not picture.exists()
    assert main([*command, "--picture", str(picture)]) == 2
    assert capsys.readouterr().err.endswith(f"\n    they are drawn in {picture}\n")
    assert "Ranks 0, 1 wait for each other" in picture.read_text()


def test_another_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", "stdlib_lm", "--ranks", "4", "--diff-ranks", "2", "--diff", "plan.decoder.tp=2"]) == 0
    )
    assert ["decoder.dp", "4", "1"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_every_config_yaml_holds_its_plan() -> None:
    config = run_with("plan.decoder.tp=2", "plan.decoder.store.shards=2").config
    assert from_yaml(RunConfig, to_yaml(config)) == config


def test_launchers() -> None:
    from weft.recipes.plan_verb import launcher

    assert launcher(1) == "weft"
    assert launcher(6) == "torchrun --nproc-per-node=6 -m weft"
    assert launcher(4096) == "torchrun --nnodes=512 --nproc-per-node=8 -m weft"


def test_ranks_are_counted_from_one() -> None:
    with pytest.raises(SystemExit):
        main(["plan", "stdlib_lm", "--ranks", "0"])
