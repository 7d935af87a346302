"""metrics.jsonl: one JSON object per step, always written; other trackers follow it.

A number that is not finite (NaN, infinity) becomes ``null``, which is valid JSON; a value that was not
measured at a step has no key. Keys of a row, all but ``step`` optional:

====================== =====================================================================================
step                   optimizer steps done, from 1
loss                   what the optimizer minimized: LM, weighted MTP and router losses, nats per token
lm_loss, mtp_loss      next-token loss; mean loss of the MTP depths before its weight; nats per token
aux_loss, z_loss       router losses as added to ``loss``
grad_norm, lr          global gradient norm before clipping; learning rate
tokens, samples        trained since step 0: target tokens; sequences
seconds                seconds of training since step 0, evaluation and saving not counted
tokens_per_second, mfu throughput of this step, waiting for data included; model FLOPs utilization
flops_per_token        arithmetic of a token, forward and backward, at the context lengths of this step
memory_gib             largest memory of the process (CPU) or of the allocator (GPU) so far, GiB
expert_load            ``{unit: [share of the routed tokens of each expert]}``, each list sums to 1
expert_load_max        largest load over the mean load, worst MoE layer
router_entropy         ``{unit: mean entropy of a token's normalized router scores, nats}``
drop_rate              ``{unit: share of the choices of experts that had no room}``, with limited capacity
drop_rate_total        the same share of the choices of all layers
valid_loss             validation loss, nats per token, at evaluation steps
valid_bits_per_byte    the same in bits per byte of text; null where the data has no count of bytes
valid_tokens           targets that were read for it
valid_accuracy         share of the samples read in which no token of the answer is wrong, if data has answers
====================== =====================================================================================
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.config.errors import RunError
from weft.spec.run import LoggerConfig
from weft.train.trackers import TrackedRun, open_trackers

FILE = "metrics.jsonl"


class Metrics:
    """The metrics of one run, written by one process (rank 0).

    Args:
        run_dir: run directory; made if it is not there.
        logger: which trackers follow the file.
        resume_step: last step of the checkpoint that the run goes on from. Rows after it are cut, so that a
            resumed run has exactly one row per step; 0 starts the file anew.
        settings: the run's configuration as plain values, for trackers that show it.

    Raises:
        ConfigError: a tracker's package is not installed.
        RunError: the file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        logger: LoggerConfig,
        resume_step: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = run_dir / FILE
        run = TrackedRun(run_dir, resume_step, plain(settings or {}))
        self._trackers = open_trackers(logger, run)
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._last = _cut(self.path, resume_step)
            self._file = self.path.open("ab", buffering=0)  # what a full disk refuses is not kept for later
        except OSError as error:
            raise unwritable(self.path, error) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the row of the next step at once, then hand its numbers to the trackers.

        Raises:
            ValueError: the step does not follow the last one (a fault of the caller).
            RunError: the file cannot be written.
        """
        step, values = int(row["step"]), plain(row)
        if step <= self._last:
            raise ValueError(f"row of step {step} after the row of step {self._last}")
        try:
            line = (json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n").encode()
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._last = step
        for tracker in self._trackers:
            tracker.log(step, _numbers("", values))

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def plain(value: Any) -> Any:
    """The value as JSON knows it: arrays and tensors as lists, numbers that are not finite as None."""
    if hasattr(value, "tolist"):  # numpy and torch, scalars too
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file of a run directory (``summary.json``, ``environment.json``, ...) in one step.

    Raises:
        RunError: the file cannot be written.
    """
    replace_text(path, json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a whole text file in one step: a reader sees the old one or the new one.

    Raises:
        RunError: the file cannot be written.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise unwritable(path, error) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file in order; a line that a killed process left unfinished is passed over."""
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole row as text and as parsed."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append((line, row))
    return found


def _cut(path: Path, resume_step: int) -> int:
    """Keep the whole rows up to ``resume_step``, the last of each step; the last step kept, or 0."""
    kept = {row["step"]: line + "\n" for line, row in _lines(path) if row["step"] <= resume_step}
    replace_text(path, "".join(kept[step] for step in sorted(kept)))
    return max(kept, default=0)


def _numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers by name, ``a/b`` for nested ones; trackers take neither lists nor missing values."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(f"{prefix}{name}/", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            found[prefix + name] = float(value)
    return found


def unwritable(path: Path, error: OSError) -> RunError:
    """The error for a file that could not be written."""
    reason = error.strerror or str(error)
    return RunError(f"cannot write {path}: {reason}; free space there, or choose another run.dir")
