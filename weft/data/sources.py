"""Sources of text: files and folders, JSONL, Python's standard library; tables are in ``tables.py``.

A source gives documents in a fixed order. Its fingerprint changes when its settings or its files do (names,
sizes, times), which is what the token cache asks about; the content itself is digested when it is tokenized.
"""

import fnmatch
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

from weft.config.errors import DataError
from weft.data.indexed import prefix_of
from weft.data.tables import TABLES, Rows, dataset_rows, hub_rows, is_dataset
from weft.spec.data import DataConfig

_NOT_OURS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text. ``id`` does not depend on where the source lies, so a split by its hash is stable."""

    id: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A document left out, and why."""

    id: str
    reason: str


@runtime_checkable
class Source(Protocol):
    """A named, fingerprinted stream of documents."""

    @property
    def name(self) -> str:
        """What the user wrote."""
        ...

    def fingerprint(self) -> str:
        """Changes when what ``documents`` gives may have changed."""
        ...

    def documents(self) -> Iterator[Document | Skipped]:
        """All documents, always in the same order.

        Raises:
            DataError: a file cannot be read as what it is; names the file and the place in it.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    """Files under a root, each read by its suffix: ``.jsonl[.gz]``, ``.parquet``, anything else one document.

    Hidden files and folders are passed over. ``distinct`` leaves out repeated contents.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    config: DataConfig
    distinct: bool = False

    def fingerprint(self) -> str:
        """Of the root, the files' names, sizes and times of change, and the settings of reading."""
        config = self.config
        settings = self.root.absolute(), config.text_field, config.encoding_errors, self.distinct
        digest = blake2b(repr(settings).encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"\0{self._id(path)} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()[:32]

    def documents(self) -> Iterator[Document | Skipped]:
        """File by file, in the order of their names."""
        seen: set[bytes] = set()
        for path in self.files:
            try:
                for entry in self._read(path):
                    yield _fresh(entry, seen) if self.distinct else entry
            except (OSError, EOFError, zlib.error) as error:  # the last two: a cut or damaged .gz
                raise DataError(f"{path}: cannot be read ({error})") from error

    def _id(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _read(self, path: Path) -> Iterator[Document | Skipped]:
        if path.suffix in TABLES:
            yield from _documents(TABLES[path.suffix](path, self.config.text_field), self._id(path))
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from self._read_jsonl(path)
        else:
            yield self._decode(path.read_bytes(), self._id(path), path, 0)

    def _read_jsonl(self, path: Path) -> Iterator[Document | Skipped]:
        opener: Callable = gzip.open if path.suffix == ".gz" else open
        offset = 0
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    entry = self._decode(line, f"{self._id(path)}:{number}", path, offset)
                    yield self._field(entry, path, number) if isinstance(entry, Document) else entry
                offset += len(line)

    def _field(self, line: Document, path: Path, number: int) -> Document:
        try:
            row = json.loads(line.text)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); a line must hold one object") from error
        field = self.config.text_field
        if not isinstance(row, dict) or field not in row:
            present = sorted(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(f"{path}:{number}: no field {field!r}, but {present}; set data.text_field")
        if not isinstance(row[field], str):
            raise DataError(f"{path}:{number}: {field!r} is a {type(row[field]).__name__}, not text")
        return Document(line.id, row[field])

    def _decode(self, data: bytes, name: str, path: Path, offset: int) -> Document | Skipped:
        try:
            return Document(name, data.decode("utf-8"))
        except UnicodeDecodeError as error:
            if self.config.encoding_errors == "skip":
                return Skipped(name, "not UTF-8")
            raise DataError(
                f"{path}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); leave it out "
                "with data.glob, or skip all such text with data.encoding_errors=skip"
            ) from error


def _fresh(entry: Document | Skipped, seen: set[bytes]) -> Document | Skipped:
    """The entry, unless its content was seen before."""
    if isinstance(entry, Skipped):
        return entry
    digest = blake2b(entry.text.encode(), digest_size=16).digest()
    if digest in seen:
        return Skipped(entry.id, "repeated content")
    seen.add(digest)
    return entry


@dataclass(frozen=True)
class RowSource:
    """Rows of a Hugging Face dataset, on disk or streamed."""

    name: str
    rows: Rows
    mark: str

    def fingerprint(self) -> str:
        """Of the files of a dataset on disk, or the name of a stream."""
        return self.mark

    def documents(self) -> Iterator[Document | Skipped]:
        """Row by row."""
        return _documents(self.rows, "row")


def _documents(rows: Rows, name: str) -> Iterator[Document | Skipped]:
    for number, text in enumerate(rows()):
        here = f"{name}:{number}"
        yield Skipped(here, "no text") if text is None else Document(here, text)


def open_source(name: str, config: DataConfig, base: Path | None = None) -> Source:
    """The source a name means; files are listed, not read. Relative paths: from here, then from ``base``.

    Raises:
        DataError: nothing is there, no file matches, or a package is missing.
    """
    if name == "stdlib":
        return stdlib_source(config)
    if name.startswith("hf:"):
        return RowSource(name, *hub_rows(name, config.text_field))
    path = find_path(name, base)
    if path.is_file():
        return FileSource(name, path.parent, (path,), config)
    if is_dataset(path):
        return RowSource(name, *dataset_rows(path, config.text_field))
    files = _walk(path, config.glob, lambda part: part.startswith("."))
    if not files:
        raise DataError(f"{name}: no file in {path} matches data.glob={config.glob!r}: an empty corpus")
    return FileSource(name, path, files, config)


def find_path(name: str, base: Path | None) -> Path:
    """A file or folder as named, or beside the blend file.

    Raises:
        DataError: neither exists.
    """
    tried = [Path(name).expanduser()]
    if base is not None and not tried[0].is_absolute():
        tried.append(base / name)
    for path in tried:
        if path.exists():
            return path
    places = " and ".join(str(p.absolute()) for p in tried)
    raise DataError(f"{name}: no such file, folder or .bin/.idx prefix (looked for {places})")


def tokenized_prefix(name: str, base: Path | None) -> Path | None:
    """The prefix of the Megatron pair a name means, from here, then from ``base``; None if it means text."""
    given = prefix_of(name)
    places = [given.expanduser(), *([base / given] if base is not None else [])]
    for place in places:
        if any(Path(f"{place}{end}").is_file() for end in (".idx", ".bin")):
            return place
    return given if str(given) != name else None  # named as a pair, but missing: opening it says so


def stdlib_source(config: DataConfig) -> FileSource:
    """The running Python's own library without its tests and IDLE, repeated contents left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, "*.py", _NOT_OURS.__contains__)
    if not files:
        raise DataError(f"{root}: holds no *.py of Python's library; set data.source to another corpus")
    return FileSource("stdlib", root, files, config, distinct=True)


def _walk(root: Path, pattern: str, left_out: Callable[[str], bool]) -> tuple[Path, ...]:
    """Files below ``root`` that match, in order; folders and files of a name left out are not entered."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not left_out(name)]
        found += [Path(folder, name) for name in fnmatch.filter(names, pattern) if not left_out(name)]
    return tuple(sorted(found))
