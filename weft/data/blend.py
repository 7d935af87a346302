"""Which sources make up which split: one source, or a blend file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from weft.config.errors import DataError
from weft.spec.data import DataConfig

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Recipe:
    """The sources of one split, as written; ``weights`` is empty where each counts by its tokens."""

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Splits and their sources; ``hold`` is the share of the training documents that become ``valid``."""

    splits: dict[str, Recipe]
    hold: float
    base: Path | None  # folder of the blend file, where relative paths are also looked up


def plan_splits(config: DataConfig) -> Plan:
    """The splits a configuration asks for.

    Raises:
        DataError: the blend file is missing, is not JSON, or is not of the form described in ``DataConfig``.
    """
    if not config.blend:
        return Plan({"train": Recipe((config.source,))}, config.valid_fraction, None)
    path = Path(config.blend).expanduser()
    splits = _read_blend(path)
    return Plan(splits, 0.0 if "valid" in splits else config.valid_fraction, path.parent)


def _read_blend(path: Path) -> dict[str, Recipe]:
    if not path.is_file():
        raise DataError(f"data.blend: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content.get("train"):
        raise DataError(f"{path}: must be an object with at least 'train': [weight, path, ...]")
    for name in content:
        if name not in SPLITS:
            near = get_close_matches(name, SPLITS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{path}: unknown split {name!r}; splits are {', '.join(SPLITS)}{hint}")
    return {name: _recipe(path, name, value) for name, value in content.items() if value}


def _recipe(path: Path, split: str, value: Any) -> Recipe:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise DataError(f"{path}: {split!r} must be a list of paths, or of weights and paths in turn")
    names, weights = entries, [w for e in entries[::2] if (w := _number(e)) is not None]
    if len(entries) == 2 * len(weights):
        names = entries[1::2]
    else:
        weights = []
    _check_entries(path, split, names, weights)
    return Recipe(tuple(names), tuple(weights))


def _check_entries(path: Path, split: str, names: Sequence[Any], weights: Sequence[float]) -> None:
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{path}: {split!r} has {name!r} where a path must stand (path {place + 1}); "
                "write [weight, path, weight, path, ...] or [path, path, ...]"
            )
    for name, weight in zip(names, weights, strict=False):
        if not 0 < weight < float("inf"):
            raise DataError(f"{path}: {split!r} gives {name} the weight {weight}; it must be more than 0")


def _number(entry: Any) -> float | None:
    try:
        return None if isinstance(entry, bool) else float(entry)
    except (TypeError, ValueError):
        return None
