"""metrics.jsonl: valid JSON always, one row per step also after a resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.config.errors import RunError
from weft.spec.run import LoggerConfig
from weft.train.metrics import FILE, Metrics, plain, read_rows, write_json


def write(run_dir: Path, steps: range, resume_step: int = 0) -> None:
    with Metrics(run_dir, LoggerConfig(), resume_step) as metrics:
        for step in steps:
            metrics.log({"step": step, "loss": step + resume_step / 1000})


def strict(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_are_on_disk_at_once(tmp_path):
    with Metrics(tmp_path / "new", LoggerConfig()) as metrics:
        metrics.log({"step": 1, "loss": 2.5})
        assert (tmp_path / "new" / FILE).read_text() == '{"step": 1, "loss": 2.5}\n'


def test_numbers_that_are_not_finite_become_null(tmp_path):
    row = {"step": 1, "loss": float("nan"), "load": {"layers.1": [0.5, float("inf")]}, "big": -float("inf")}
    with Metrics(tmp_path, LoggerConfig()) as metrics:
        metrics.log(row)
    assert strict((tmp_path / FILE).read_text()) == {
        "step": 1, "loss": None, "load": {"layers.1": [0.5, None]}, "big": None,
    }  # fmt: skip


def test_tensors_and_arrays_become_plain_numbers():
    value = {
        "a": np.float32(0.5),
        "b": np.array([1, 2]),
        "c": torch.tensor(2.0),
        "d": (np.float64("nan"), True),
    }
    assert plain(value) == {"a": 0.5, "b": [1, 2], "c": 2.0, "d": [None, True]}
    assert plain({"path": Path("runs/x"), 3: None}) == {"path": "runs/x", "3": None}


def test_a_resumed_run_has_one_row_per_step(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    write(tmp_path, range(5, 10), resume_step=4)
    rows = read_rows(tmp_path / FILE)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == [1, 2, 3, 4, 5.004, 6.004, 7.004, 8.004, 9.004]
    assert all(strict(line) for line in (tmp_path / FILE).read_text().splitlines())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_new_run_starts_the_file_anew(tmp_path):
    write(tmp_path, range(1, 5))
    write(tmp_path, range(1, 3))
    assert [row["step"] for row in read_rows(tmp_path / FILE)] == [1, 2]


def test_kept_rows_are_kept_byte_for_byte(tmp_path):
    line = '{"loss":1.10, "step":1,"note":"é\u2028"}\n'
    (tmp_path / FILE).write_text(line + '{"step": 2}\n', encoding="utf-8")
    write(tmp_path, range(2, 2), resume_step=1)
    assert (tmp_path / FILE).read_text(encoding="utf-8") == line


def test_steps_only_go_forward(tmp_path):
    with Metrics(tmp_path, LoggerConfig()) as metrics:
        metrics.log({"step": 3})
        with pytest.raises(ValueError, match="step 3 after the row of step 3"):
            metrics.log({"step": 3})


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, LoggerConfig())
    metrics._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(metrics, "_file", full)
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left on device; free"):
            metrics.log({"step": 1, "loss": 1.0})
        metrics.close()


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        Metrics(tmp_path / "file" / "run", LoggerConfig())
    with pytest.raises(RunError, match=r"cannot write .*summary\.json"):
        write_json(tmp_path / "file" / "summary.json", {})
