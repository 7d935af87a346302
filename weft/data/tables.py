"""Tables of text: Parquet files and Hugging Face datasets, on disk or streamed. Their packages are extras."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from weft.config.errors import DataError

Rows = Callable[[], Iterator[str | None]]
_EXTRAS = {"pyarrow": "parquet", "datasets": "datasets"}


def require(package: str, why: str) -> None:
    """Refuse, with the extra to install, when a package is missing; nothing is imported."""
    if find_spec(package) is None:
        raise DataError(f"{why} needs the package {package}: pip install 'weft[{_EXTRAS[package]}]'")


def _load(package: str, module: str, why: str) -> ModuleType:
    require(package, why)
    return importlib.import_module(module)


def _parquet_rows(path: Path, field: str) -> Rows:
    return partial(_read_parquet, path, field)


TABLES: dict[str, Callable[[Path, str], Rows]] = {".parquet": _parquet_rows}


def _read_parquet(path: Path, field: str) -> Iterator[str | None]:
    parquet = _load("pyarrow", "pyarrow.parquet", str(path))
    arrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            _check_field(str(path), field, file.schema_arrow.names)
            for batch in file.iter_batches(columns=[field]):
                yield from _texts(str(path), field, batch.column(0).to_pylist())
    except (arrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from error


def is_dataset(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    single = all((path / name).is_file() for name in ("state.json", "dataset_info.json"))
    return single or (path / "dataset_dict.json").is_file()


def dataset_rows(path: Path, field: str) -> tuple[Rows, str]:
    """(rows, fingerprint) of a dataset saved on disk.

    Raises:
        DataError: the folder holds several splits, the field is missing, or it cannot be read.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if is_dataset(p))
        raise DataError(f"{path}: holds the splits {splits}; name one, for example {path / splits[0]}")
    require("datasets", str(path))
    files = sorted(p for p in path.iterdir() if p.is_file())
    state = "\0".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    return partial(_read_dataset, path, field), f"{field}\0{state}"


def _read_dataset(path: Path, field: str) -> Iterator[str | None]:
    datasets = _load("datasets", "datasets", str(path))
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a dataset that can be read ({error})") from error
    _check_field(str(path), field, table.column_names)
    for row in table.select_columns([field]):
        yield from _texts(str(path), field, [row[field]])


def hub_rows(name: str, field: str) -> tuple[Rows, str]:
    """(rows, fingerprint) of ``hf:NAME[:SPLIT[:CONFIG]]``, streamed; a folder of data files is a NAME too.

    The fingerprint is the name: what was tokenized once is not looked up again.
    """
    dataset, split, subset, *more = [*name.removeprefix("hf:").split(":"), "", ""]
    if not dataset or any(more):
        raise DataError(f"{name}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:CONFIG")
    require("datasets", name)
    return partial(_read_hub, name, (dataset, subset or None, split or "train"), field), f"{field}\0{name}"


def _read_hub(name: str, address: tuple[str, str | None, str], field: str) -> Iterator[str | None]:
    datasets = _load("datasets", "datasets", name)
    dataset, subset, split = address
    try:
        for row in datasets.load_dataset(dataset, subset, split=split, streaming=True):
            _check_field(name, field, list(row))
            yield from _texts(name, field, [row[field]])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error


def _check_field(where: str, field: str, present: Sequence[str]) -> None:
    if field not in present:
        raise DataError(f"{where}: no column {field!r}; it has {sorted(present)}: set data.text_field")


def _texts(where: str, field: str, values: Sequence[object]) -> Iterator[str | None]:
    for value in values:
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: column {field!r} holds {type(value).__name__}, not text")
        yield value
