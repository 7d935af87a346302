"""Samples as they lie: lines of a JSONL file, or members of a WebDataset archive that share a key."""

import glob
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from weft.config.errors import DataError
from weft.data.media.blob import Blob, Fault, inside, whole
from weft.spec.data import DataConfig

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg")
FILMS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_WORDS = {
    **dict.fromkeys(PICTURES, "image"),
    **dict.fromkeys(SOUNDS, "audio"),
    **dict.fromkeys(FILMS, "video"),
}
_TEXTS = (".json", ".txt")
Find = Callable[[str], tuple[Blob, ...]]


@dataclass(frozen=True)
class Sample:
    """One row of data.

    Attributes:
        id: does not depend on where the data lies.
        place: file and line, or archive and key.
        row: an object with ``messages``, or with text alone.
        find: where the bytes of a named file lie; of a folder, all pictures in it.
    """

    id: str
    place: str
    row: dict[str, Any]
    find: Find


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read, and why."""

    id: str
    place: str
    fault: Fault


@dataclass(frozen=True)
class Lines:
    """A ``.jsonl`` file; names in it are relative to its folder."""

    path: Path
    config: DataConfig

    def fingerprint(self) -> str:
        """Of name, size and time of change."""
        return _fingerprint([self.path])

    def rows(self) -> Iterator[Sample | Broken]:
        """Line by line; empty lines are passed over."""
        most, offset = self.config.media.max_bytes, 0
        with self.path.open("rb") as stream:
            for number in itertools.count(1):
                line = stream.readline(most)
                if not line:
                    return
                if line.strip():
                    yield self._row(line, number, offset)
                offset += len(line)
                while len(line) == most and not line.endswith(b"\n"):  # the rest of a line that was refused
                    line = stream.readline(most)
                    offset += len(line)

    def _row(self, line: bytes, number: int, offset: int) -> Sample | Broken:
        name, place = f"{self.path.name}:{number}", f"{self.path}:{number}"
        try:
            if len(line) == self.config.media.max_bytes:
                raise Fault("too many bytes", "the line is longer than data.media.max_bytes; raise it")
            row = read_object(line)
        except Fault as fault:
            return Broken(name, place, fault)
        return Sample(name, place, row, lambda wanted: self._find(wanted, line, offset))

    def _find(self, name: str, line: bytes, offset: int) -> tuple[Blob, ...]:
        if name.startswith("data:"):
            return (inside(payload(name), line, str(self.path), offset),)
        path = self._allowed(local(name))
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            return tuple(whole(p) for p in found)
        return (whole(path),)

    def _allowed(self, name: str) -> Path:
        folder = self.path.parent.resolve()
        path = (folder / name).resolve()
        if not self.config.media.outside and not path.is_relative_to(folder):
            fix = "move it there, or set data.media.outside=true if you trust this file"
            raise Fault("outside the folder", f"{name} lies outside {folder}: {fix}")
        return path


@dataclass(frozen=True)
class Shards:
    """WebDataset archives: members whose names are alike up to the first dot are one sample.

    ``.json`` holds ``messages`` that name other members by name or ending; ``.txt`` is the caption of the
    media beside it.
    """

    paths: tuple[Path, ...]
    config: DataConfig

    def fingerprint(self) -> str:
        """Of names, sizes and times of change."""
        return _fingerprint(self.paths)

    def rows(self) -> Iterator[Sample | Broken]:
        """Archive by archive; headers and texts are read, media are passed over."""
        for path in self.paths:
            try:
                with tarfile.open(path, "r:") as archive:
                    members = (m for m in archive if m.isfile())
                    for key, group in itertools.groupby(members, lambda m: _key(m.name)):
                        yield self._row(path, key, list(group))
                    _check_end(path, archive)
            except (tarfile.TarError, OSError, EOFError) as error:
                detail = f"the archive cannot be read on ({error}); copy it again, or unpack a compressed one"
                yield Broken(path.name, str(path), Fault("damaged archive", detail))

    def _row(self, path: Path, key: str, members: list[tarfile.TarInfo]) -> Sample | Broken:
        blobs = {m.name[len(key) :]: Blob(str(path), m.offset_data, m.size) for m in members}
        name, place = f"{path.name}/{key}", f"{path}: {key}"

        def find(wanted: str) -> tuple[Blob, ...]:
            if wanted.startswith("data:"):
                source = blobs[".json"]
                raw = source.read(self.config.media.max_bytes)
                return (inside(payload(wanted), raw, source.path, source.offset),)
            asked = local(wanted)
            base, ending = key.rpartition("/")[2], asked.removeprefix(key)
            for form in (ending, f".{ending}", asked.removeprefix(base)):
                if form in blobs:
                    return (blobs[form],)
            raise Fault("missing file", f"names {wanted}, but has {', '.join(sorted(blobs))}")

        try:
            return Sample(name, place, self._content(blobs), find)
        except Fault as fault:
            return Broken(name, place, fault)

    def _content(self, blobs: dict[str, Blob]) -> dict[str, Any]:
        most = self.config.media.max_bytes
        if ".json" in blobs:
            return read_object(blobs[".json"].read(most))
        if ".txt" not in blobs:
            raise Fault("no text", f"has {', '.join(sorted(blobs))}, but neither .json nor .txt")
        caption = _utf8(blobs[".txt"].read(most)).strip()
        parts = [
            {"type": word, word: ending}
            for ending in sorted(blobs)
            if (word := _WORDS.get(Path(f"x{ending}").suffix.lower()))
        ]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": caption}]
        return {"messages": turns}


def _check_end(path: Path, archive: tarfile.TarFile) -> None:
    """Refuse an archive without the block of zeros that ends one; tarfile takes a cut header for the end."""
    last = max((m.offset_data + m.size for m in archive.getmembers()), default=0)
    with path.open("rb") as stream:
        stream.seek(-(-last // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end")


Samples = Lines | Shards
"""A fingerprinted stream of rows, always in the same order."""


def _key(name: str) -> str:
    """A member's name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def read_object(data: bytes) -> dict[str, Any]:
    """A JSON object; a bare list is taken for ``messages``.

    Raises:
        Fault: it is none.
    """
    try:
        row = json.loads(_utf8(data))
    except (ValueError, RecursionError) as error:
        raise Fault("not JSON", f"not JSON ({error})") from error
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise Fault("not JSON", f"must hold one object, not a {type(row).__name__}")
    return row


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Fault("not UTF-8", f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x})") from error


def payload(name: str) -> str:
    """The base64 text of a ``data:`` address.

    Raises:
        Fault: it is not base64.
    """
    head, comma, text = name.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Fault("not base64", f"{name[:40]}... is not of the form data:TYPE;base64,DATA")
    return text


def local(name: str) -> str:
    """The path that a name or a ``file://`` address means.

    Raises:
        Fault: it is an address on a network.
    """
    scheme = name.partition("://")[0].lower() if "://" in name else ""
    if scheme == "file":
        return unquote(urlsplit(name).path)
    if scheme:
        fix = "nothing is fetched: download it into the folder of the data and name it there"
        raise Fault("on a network", f"{name} is an address; {fix}")
    return name


def _fingerprint(paths: list[Path] | tuple[Path, ...]) -> str:
    digest = blake2b(digest_size=16)
    for path in paths:
        stat = path.stat()
        digest.update(f"\0{path.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def open_samples(name: str, config: DataConfig, base: Path | None = None) -> Samples:
    """The rows that a name means: a ``.jsonl`` file, a ``.tar``, a folder of those, or a pattern.

    A pattern has ``{000..015}``, ``{a,b}``, ``*``, ``?`` or ``[...]`` in it. Relative names are looked up
    from here, then from ``base``.

    Raises:
        DataError: nothing is there.
    """
    tried = [Path(name).expanduser()]
    if base is not None and not tried[0].is_absolute():
        tried.append(base / name)
    found = next((paths for place in tried if (paths := _listed(place))), ())
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        where = missing[0] if missing else " or ".join(str(p.absolute()) for p in tried)
        raise DataError(
            f"{name}: no .jsonl file and no .tar archive at {where}; mend data.source or data.blend"
        )
    if found[0].suffix == ".jsonl":
        return Lines(found[0], config)
    return Shards(found, config)


def _listed(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        return tuple(sorted(path.glob("*.tar")))
    if path.suffix == ".jsonl":
        return (path,) if path.is_file() else ()
    if path.suffix != ".tar":
        return ()
    if path.is_file():
        return (path,)
    places = [Path(text) for text in _expanded(str(path))]
    return tuple(
        found
        for place in places
        for found in (
            sorted(Path(p) for p in glob.glob(str(place))) if glob.has_magic(str(place)) else [place]
        )
        if len(places) > 1 or found.is_file()
    )


def _expanded(text: str) -> Iterator[str]:
    """The names that a pattern with braces means."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if not braces:
        yield text
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if span:
        low, high = int(span[1]), int(span[2])
        choices = [str(n).zfill(len(span[1])) for n in range(low, high + 1)]
    else:
        choices = braces[1].split(",")
    for choice in choices:
        yield from _expanded(text[: braces.start()] + choice + text[braces.end() :])
