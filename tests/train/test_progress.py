"""The display: plain lines in a pipe, a live one on a terminal, the results at the end."""

import io
import math

import pytest
from fake_run import SAMPLE, fake_rows, fake_summary
from rich.console import Console

from weft.train.progress import Progress, show_summary, sparkline
from weft.train.units import compared, duration, printable, short


class Steps:
    """A clock that moves two seconds per reading."""

    def __init__(self) -> None:
        self.time = -2.0

    def __call__(self) -> float:
        self.time += 2.0
        return self.time


def piped(rows, encoding="utf-8", **settings) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    settings = {"train_iters": 100, "log_interval": 25, **settings}
    with Progress("demo", console=Console(file=out), now=Steps(), **settings) as progress:
        for row in rows:
            progress.update(row)
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def test_a_pipe_gets_one_plain_line_per_interval_and_evaluation():
    lines = piped(fake_rows(100, 100), encoding="ascii").splitlines()
    places = [line[:12] for line in lines]
    assert places == [f"step {s:>3}/100" for s in (25, 50, 50, 75, 100, 100)]
    assert "validation" in lines[2]
    assert all(part in lines[0] for part in ("loss ", "grad ", "lr ", "tok/s", "MFU "))
    assert all(character.isprintable() for line in lines for character in line)


def test_data_without_bytes_is_validated_in_nats_and_answers():
    rows = [{"step": 1, "valid_bits_per_byte": None, "valid_loss": 0.0123, "valid_accuracy": 0.953}]
    rows += [{"step": 2, "valid_bits_per_byte": None, "valid_loss": 0.5}, {"step": 3, "valid_loss": None}]
    assert piped(rows).splitlines() == [
        "step   1/100  validation 0.0123 nats  accuracy 95.3%",
        "step   2/100  validation 0.5000 nats",
    ]


def test_long_lines_are_not_wrapped():
    name = "x" * 300
    out = io.StringIO()
    Progress("demo", 10, console=Console(file=out)).note(name)
    assert out.getvalue() == name + "\n"


def test_the_time_left_follows_the_last_steps():
    rows = [{"step": step, "loss": 1.0} for step in range(1, 76)]
    lines = piped(rows).splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["2 min 30 s left", "1 min 40 s left", "50.0 s left"]
    assert math.isnan(Progress("demo", 10, console=Console(file=io.StringIO())).remaining())


def test_a_resumed_run_counts_only_its_own_steps():
    lines = piped([{"step": step} for step in range(76, 101)], start_step=75).splitlines()
    assert lines == ["step 100/100  done"]


def test_numbers_that_are_not_finite_are_shown_as_such():
    assert "loss nan" in piped([{"step": 25, "loss": float("nan")}])
    assert "loss nan" in piped([{"step": 25, "loss": None}])


def test_a_terminal_gets_a_live_display():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False, _environ={})
    with Progress("demo", 100, 25, console=console, now=Steps()) as progress:
        for row in fake_rows(60, 100):
            progress.update(row)
        progress._live.refresh()
    shown = out.getvalue()
    assert all(part in shown for part in ("demo", "60/100", "left", "━", "tok/s", "bits/byte at step 50"))
    assert "step  25/100" in shown


def test_sparkline_shows_the_shape():
    assert sparkline([]) == ""
    assert sparkline([3.0]) == "▁"
    assert sparkline([2.0, 2.0, 2.0]) == "▁▁▁"
    assert sparkline([8.0, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([9.0] * 100 + [1.0] * 100, width=4) == "▁▁▁▁"


def results(summary, **settings) -> str:
    out = io.StringIO()
    show_summary(summary, Console(file=out, width=100, **settings))
    return out.getvalue()


def test_the_summary_compares_with_the_baselines():
    summary = fake_summary({"tokens": 1_000_000, "seconds": 252.0, "valid_bits_per_byte": 1.2})
    shown = results(summary)
    rows = [line.split() for line in shown.splitlines()]
    assert ["this", "model", "1.2000"] in rows
    assert ["unigram", "model", "2.8710", "58.2%", "lower"] in rows
    assert ["zlib", "-9", "1.6040", "25.2%", "lower"] in rows
    assert ["lzma", "-9e", "1.3720", "12.5%", "lower"] in rows
    assert "5.41M parameters (2.10M active), 1.00M tokens, 4 min 12 s of training" in shown
    assert SAMPLE["text"].splitlines()[1] in shown
    assert all(path in shown for path in summary["paths"].values())
    assert "\x1b" not in shown


def test_the_summary_compares_answers():
    answers = {"accuracy": 0.9554, "shuffled": 0.097, "documents": 1359, "exchanged": "pictures"}
    answers["baselines"] = {"logistic regression on pixels": 0.967, "[b]\x1b[2J": 0.9554}
    shown = results({"name": "digits", "answers": answers, "valid": {"bits_per_byte": None}})
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "Answers to 1,359 held-out samples" in rows
    assert [row for row in rows if "%" in row] == [
        "this model 95.5%",
        "logistic regression on pixels 96.7% 1.2 points lower",
        "[b]\N{REPLACEMENT CHARACTER}[2J 95.5% equal",
        "this model, pictures exchanged 9.7% 85.8 points higher",
    ]


def test_a_summary_without_validation_still_shows():
    shown = results({"name": "mock", "valid": {"bits_per_byte": None}, "paths": {"report": "r.html"}})
    assert shown.split() == ["mock", "Report", "r.html"]


def test_text_of_a_model_does_not_steer_the_terminal():
    sample = {"prompt": "\x1b[2J", "text": "a\x1b[31m\x07[bold]b[/bold] \x9b é\u202e"}
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show_summary({"sample": sample}, Console(file=out, force_terminal=True, _environ={}))
    out.flush()
    text = out.buffer.getvalue()
    assert b"a?[31m?[bold]b[/bold] ? ??" in text
    assert b"\x1b[31m" not in text
    assert b"\x1b[2J" not in text
    assert printable("a\tb\n\x00") == "a\tb\n\N{REPLACEMENT CHARACTER}"


def test_units():
    assert [short(v) for v in (0, 12.3456, 999, 999.6, 1234, 12345, 99999, 1234567, 3.1e12)] == [
        "0", "12.3", "999", "1.00k", "1.23k", "12.3k", "100k", "1.23M", "3.10T",
    ]  # fmt: skip
    assert short(float("nan")) == "nan"
    assert [duration(s) for s in (0.04, 8.44, 59.94, 59.97, 252, 3599.6, 11100, 187200)] == [
        "0.0 s", "8.4 s", "59.9 s", "1 min 00 s", "4 min 12 s", "1 h 00 min", "3 h 05 min", "2 d 04 h",
    ]  # fmt: skip
    assert duration(math.inf) == "unknown"
    assert compared(1.0, 1.0) == "equal"
    assert compared(1.04, 1.0) == "4.0% higher"


@pytest.mark.parametrize("value", [9.995, 99.95, 999.5, 9995, 99950, 999500])
def test_short_has_at_most_three_digits(value):
    assert sum(c.isdigit() for c in short(value)) <= 4
