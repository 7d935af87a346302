"""What a run shows: a live display on a terminal, plain lines in a pipe or file, the results at the end."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from weft.train.report_answers import Compared, comparison
from weft.train.units import BASELINES, compared, duration, printable, short

_BLOCKS = "▁▂▃▄▅▆▇█"
# key of a row -> how it is shown, in the order of the line
_COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "grad_norm": lambda v: f"grad {v:.3f}",
    "lr": lambda v: f"lr {v:.2e}",
    "tokens_per_second": lambda v: f"{short(v):>5} tok/s",
    "mfu": lambda v: f"MFU {v:.1%}",
}


class Progress:
    """Follows the steps of a run.

    On a terminal a display of three lines is redrawn below whatever else is printed. Everywhere else (and
    above the display) there is one plain line per ``log_interval`` steps and one per evaluation, without
    control characters and in the characters of any encoding.

    Args:
        name: name of the run.
        train_iters: steps of the run.
        log_interval: steps between lines.
        start_step: steps done before this process began.
        console: where to write; standard output if not given.
        now: clock in seconds, for the time that is left.
    """

    def __init__(
        self,
        name: str,
        train_iters: int,
        log_interval: int = 10,
        start_step: int = 0,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._iters, self._interval, self._now = name, train_iters, log_interval, now
        self._console = console or Console()
        self._begin, self._step, self._valid = now(), start_step, "no validation yet"
        self._times: deque[tuple[int, float]] = deque([(start_step, self._begin)], maxlen=50)
        self._losses: deque[float] = deque(maxlen=2000)
        self._row: Mapping[str, Any] = {}
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = (
            Live(console=self._console, get_renderable=self._display, transient=True) if live else None
        )

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Take the metrics row of one step (see ``weft.train.metrics``)."""
        self._row, self._step = row, int(row["step"])
        self._times.append((self._step, self._now()))
        if _known(row, "loss"):
            self._losses.append(float(row["loss"]))
        place = f"step {self._step:>{len(str(self._iters))}}/{self._iters}"
        if self._step % self._interval == 0 or self._step == self._iters:
            left = f"{duration(self.remaining())} left" if self._step < self._iters else "done"
            self.note("  ".join([place, *self._facts(), left]))
        if found := _validation(row):
            self._valid = f"{found} at step {self._step}"
            self.note(f"{place}  {found}")

    def note(self, text: str) -> None:
        """Print a line of its own, for example that a checkpoint was saved."""
        _plain(self._console, text)

    def remaining(self) -> float:
        """Seconds left at the speed of the last steps; NaN before the first one."""
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (self._iters - last) * (end - begin) / (last - first) if last > first else math.nan

    def _facts(self) -> list[str]:
        """What the last row says; None in a row is a number that was not finite."""
        row = {key: math.nan if value is None else value for key, value in self._row.items()}
        return [form(row[key]) for key, form in _COLUMNS.items() if key in row]

    def _display(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._iters, completed=self._step, width=40)
        spent = duration(self._now() - self._begin)
        left = self.remaining()
        eta = "starting" if math.isnan(left) else f"{duration(left)} left"
        head.add_row(Text(self._name, "bold"), bar, f"{self._step}/{self._iters}", f"{spent}, {eta}")
        spark = sparkline(list(self._losses)) if self._console.encoding.startswith("utf") else ""
        facts = Text("  ".join([spark, *self._facts()]))
        facts.stylize("cyan", 0, len(spark))
        return Group(head, facts, Text(self._valid, "dim"))


def _validation(row: Mapping[str, Any]) -> str:
    """What an evaluation found; empty in the row of a step without one."""
    if _known(row, "valid_bits_per_byte"):
        found = f"validation {row['valid_bits_per_byte']:.4f} bits/byte"
    elif _known(row, "valid_loss"):
        found = f"validation {row['valid_loss']:.4f} nats"
    else:
        return ""
    return f"{found}  accuracy {row['valid_accuracy']:.1%}" if _known(row, "valid_accuracy") else found


def sparkline(values: list[float], width: int = 24) -> str:
    """The last half of a curve, and at least its last ``width`` values, as block characters."""
    tail = values[min(len(values) // 2, max(0, len(values) - width)) :]
    cells = min(width, len(tail))
    parts = [tail[i * len(tail) // cells : (i + 1) * len(tail) // cells] for i in range(cells)]
    levels = [sum(part) / len(part) for part in parts]
    low, span = min(levels, default=0.0), (max(levels, default=0.0) - min(levels, default=0.0)) or 1.0
    return "".join(_BLOCKS[round((level - low) / span * 7)] for level in levels)


def show_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the results of a run: figures, validation beside its baselines, sample, where the files lie.

    Args:
        summary: the content of ``summary.json`` (see ``weft.train.report``).
        console: where to write; standard output if not given.
    """
    console = console or Console()
    valid, sample, paths = (summary.get(key) or {} for key in ("valid", "sample", "paths"))
    parts = [str(summary.get("name", "run"))]
    if _known(summary, "params"):
        active = f" ({short(summary['active_params'])} active)" if summary.get("active_params") else ""
        parts.append(f"{short(summary['params'])} parameters{active}")
    if _known(summary, "tokens"):
        parts.append(f"{short(summary['tokens'])} tokens")
    if _known(summary, "seconds"):
        parts.append(f"{duration(summary['seconds'])} of training")
    _plain(console, f"\n{', '.join(parts)}", "bold")
    if _known(valid, "bits_per_byte"):
        console.print(_comparison(valid, summary.get("baselines") or {}))
    if compared_answers := comparison(summary.get("answers") or {}):
        console.print(_answers(compared_answers, summary["answers"].get("documents", 0)))
    if sample.get("text"):
        _plain(console, f"Sample after {sample.get('prompt', '')!r}", "bold")
        _plain(console, f"{sample['text'].rstrip()}\n")
    for name, path in paths.items():
        _plain(console, f"{name.capitalize():<12}{path}")


def _comparison(valid: Mapping[str, Any], baselines: Mapping[str, Any]) -> Table:
    title = f"Validation over {valid['bytes']:,} bytes" if _known(valid, "bytes") else "Validation"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE)
    for column in ("", "bits per byte", "this model is"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("this model", f"{valid['bits_per_byte']:.4f}", "", style="bold")
    for key, label in BASELINES.items():
        if _known(baselines, key):
            difference = compared(valid["bits_per_byte"], baselines[key])
            table.add_row(label, f"{baselines[key]:.4f}", difference)
    return table


def _answers(found: list[Compared], documents: int) -> Table:
    title = f"Answers to {documents:,} held-out samples"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE)
    for column in ("", "accuracy", "this model is"):
        table.add_column(column, justify="right" if column else "left")
    for one in sorted(found, key=lambda one: not one.own):
        name = Text(printable(one.name))
        table.add_row(name, f"{one.value:.1%}", one.words, style="bold" if one.own else "")
    return table


def _known(values: Mapping[str, Any], key: str) -> bool:
    """Whether a finite number was recorded."""
    value = values.get(key)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _plain(console: Console, text: str, style: str = "") -> None:
    """Print text as it is, without what steers a terminal or what the console's encoding lacks."""
    known = printable(text).encode(console.encoding, errors="replace").decode(console.encoding)
    console.print(Text(known), style=style, soft_wrap=True)
