"""The command: verbs, exit statuses, messages, speed, and no torch before settings are right."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from weft.config.errors import ConfigError
from weft.recipes.cli import main

VERBS = ("train", "generate", "import", "export", "compare", "data", "report")
ROOT = Path(__file__).parents[2]

# Runs the command in a process that ends with a word on stderr if torch was imported.
WATCH = """
import sys
from weft.recipes.cli import main
status = main(sys.argv[1:])
print("TORCH" if "torch" in sys.modules else "no torch", file=sys.stderr)
raise SystemExit(status)
"""


def watched(*arguments: str) -> tuple[int, str, str, float]:
    start = time.monotonic()
    command = [sys.executable, "-c", WATCH, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


def test_dry_run_shows_every_value_without_torch() -> None:
    status, out, err, seconds = watched("train", "stdlib_lm", "--dry-run", "run.seed=7", "optimizer.lr=2e-3")
    assert status == 0
    assert err == "no torch\n"
    assert seconds < 2
    lines = [line.split() for line in out.splitlines()]
    assert ["run.seed", "7", "command", "line"] in lines
    assert ["optimizer.lr", "0.002", "command", "line"] in lines
    assert ["optimizer.eps", "1.0e-08", "default"] in lines
    assert ["model.time_step_limit", "[0.0,", ".inf]", "default"] in lines
    assert any(line[:1] == ["model.pattern"] and line[-2:] == ["recipe", "stdlib_lm"] for line in lines)
    assert "\x1b" not in out
    assert out.endswith("next:\n  weft train stdlib_lm run.seed=7 optimizer.lr=2e-3\n")


def test_wrong_settings_stop_before_torch_with_status_2() -> None:
    status, out, err, seconds = watched("train", "stdlib_lm", "train.train_iter=5", "train.precision=fp8")
    assert status == 2
    assert out == ""
    assert seconds < 2
    assert err.splitlines() == [
        "weft: 2 problems in the configuration:",
        "  train.train_iter: unknown name; did you mean train.train_iters? (command line)",
        "  train.precision: expected one of fp64, fp32, bf16, not 'fp8' (command line)",
        "no torch",
    ]


def test_python_dash_m_weft() -> None:
    command = [sys.executable, "-m", "weft", "train", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("weft: 1 problem in the configuration:\n  nothing: no recipe of this name")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example:\n  weft {verb} " in capsys.readouterr().out


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"    {verb} " in out for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "RECIPE"),
        (["train", "stdlib_lm", "--dryrun"], "unknown arguments: --dryrun"),
        (["report", "a", "b"], "unknown arguments: b"),
        (["generate", "ckpt", "--token-ids", "1,b"], "expected whole numbers with commas"),
    ],
)
def test_wrong_commands(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "order", [("--dry-run", "stdlib_lm", "run.seed=7"), ("stdlib_lm", "run.seed=7", "--dry-run")]
)
def test_overrides_and_options_in_any_order(
    order: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *order]) == 0
    assert "run.seed" in capsys.readouterr().out


def test_config_files_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("run: {seed: 1, threads: 2}\n")
    (tmp_path / "b.yaml").write_text("run:\n  seed: 3\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert main(["train", "stdlib_lm", *files, "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["run.seed", "3", "b.yaml:2"] in lines
    assert ["run.threads", "2", "a.yaml:1"] in lines


def test_compare_needs_something_to_compare_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "hf", "ckpt"]) == 2
    assert "give --prompt TEXT or --token-ids 1,2,3" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["nemotron3_ultra_pretrain", "nemotron3_super_pretrain_tiny"])
def test_costs(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", size, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("parameters", "parameters without MTP", "active parameters", "training FLOPs per token"):
        assert f"\n{name} " in out
    assert ("549,308,993,536" in out) == (size == "nemotron3_ultra_pretrain")


@pytest.mark.parametrize("action", ["build", "inspect"])
def test_data_of_a_recipe(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["nemotron3_super_pretrain_tiny", f"run.dir={tmp_path / 'run'}", "data.mock_tokens=2048"]
    assert main(["data", action, *words]) == 0
    out = capsys.readouterr().out
    assert "train" in out
    assert f"weft train {' '.join(words)}" in out


def test_what_stops_a_run_is_one_message_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.txt").write_bytes(b"text \xff")
    words = [f"data.source={tmp_path / 'odd.txt'}", f"run.dir={tmp_path / 'run'}"]
    assert main(["data", "build", "stdlib_lm", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("weft: ")
    assert "odd.txt" in error
    assert "Traceback" not in error


def test_a_missing_source_is_found_with_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "stdlib_lm", f"data.source={tmp_path / 'absent'}"]) == 2
    assert "data.source: " in capsys.readouterr().err


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["train", "nothing"])


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m weft train stdlib_lm --dry-run | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.startswith("run.name")
    assert done.stderr == ""
