"""A run directory read back: what the report is made from, and nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from weft.config.errors import RunError
from weft.train.metrics import FILE, read_rows


@dataclass(frozen=True)
class Series:
    """One measured quantity: the steps at which it was recorded, its values (NaN where not finite)."""

    steps: np.ndarray
    values: np.ndarray

    @cached_property
    def finite(self) -> np.ndarray:
        """The finite values."""
        return self.values[np.isfinite(self.values)]

    def __bool__(self) -> bool:
        return len(self.finite) > 0


@dataclass(frozen=True)
class Record:
    """Everything a run directory says about its run; what is known at its end is empty until then."""

    name: str
    config: dict[str, Any]
    origins: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]
    timeline: dict[str, Any]
    predictions: dict[str, Any]

    def setting(self, path: str) -> Any:
        """One value of the configuration by its dotted name; None if it is not there."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def series(self, key: str, unit: str | None = None) -> Series:
        """One key of the rows; with ``unit``, that entry of a key which holds one value per unit."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        if unit is not None:
            found = [(step, value.get(unit)) for step, value in found if isinstance(value, Mapping)]
        values = [math.nan if value is None else value for _, value in found]
        return Series(np.array([step for step, _ in found], dtype=int), np.array(values, dtype=float))

    def units(self, key: str) -> list[str]:
        """Units that the key ever names, in order of appearance."""
        return list({unit: None for row in self.rows for unit in row.get(key) or ()})

    def loads(self, unit: str) -> tuple[np.ndarray, np.ndarray]:
        """Expert load of a MoE layer over an even share: ``steps[rows]`` and ``load[rows, experts]``."""
        found = [(row["step"], (row.get("expert_load") or {}).get(unit)) for row in self.rows]
        found = [(step, share) for step, share in found if share and None not in share]
        load = np.array([share for _, share in found], dtype=float)
        return np.array([step for step, _ in found], dtype=int), load * (load.shape[1] if found else 1)

    def bits_per_byte(self) -> float | None:
        """Factor from nats per token to bits per byte on the validation text; None before any evaluation."""
        valid = self.summary.get("valid") or {}
        if valid.get("tokens") and valid.get("bytes"):
            return valid["tokens"] / valid["bytes"] / math.log(2)
        both = [(row.get("valid_bits_per_byte"), row.get("valid_loss")) for row in self.rows]
        return next((bits / loss for bits, loss in reversed(both) if bits and loss), None)

    def not_finite(self) -> list[int]:
        """Steps whose loss or gradient norm was not finite."""
        keys = ("loss", "lm_loss", "grad_norm")
        return [row["step"] for row in self.rows if any(key in row and row[key] is None for key in keys)]


def read_run(run_dir: Path) -> Record:
    """Read the files of a run directory; only config.yaml must be there.

    Raises:
        RunError: not a run directory, or one of its files cannot be read.
    """
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir} is not a run directory: it has no config.yaml; give the one in run.dir")
    config = _mapping(run_dir / "config.yaml")
    summary = _mapping(run_dir / "summary.json")
    run = config.get("run")
    name = summary.get("name") or (run.get("name") if isinstance(run, dict) else "") or run_dir.name
    names = ("origins", "environment", "timeline", "predictions")
    found = {file: _mapping(run_dir / f"{file}.json") for file in names}
    return Record(name=str(name), config=config, rows=read_rows(run_dir / FILE), summary=summary, **found)


def _mapping(path: Path) -> dict[str, Any]:
    """Content of a YAML or JSON file; nothing if it is not there."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} cannot be read: {error}; restore it from a copy") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds {type(value).__name__} where settings belong; restore it from a copy")
    return value
