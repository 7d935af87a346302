"""The manifest of a checkpoint: what each file holds, with a checksum for every byte.

``manifest.json`` is JSON whose last member is the xxh3_128 of all bytes before that checksum's digits, so
a flipped bit anywhere in it shows. Later format versions keep this frame: ``format``, ``version`` and the
trailing checksum. The bytes of a shard are its header and its pieces, each with a checksum here.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from weft.config.errors import CheckpointError
from weft.plan.box import Box, tiles

NAME = "manifest.json"
FORMAT = "weft checkpoint"
VERSION = 1

# The names of the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_FILE = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)  # no separator: nothing outside the directory
_DIGEST = re.compile(r"[0-9a-f]{32}")
_TAIL = b'"\n}\n'


@dataclass(frozen=True)
class FileRecord:
    """One shard: its size, and size and checksum of its safetensors header (length field included)."""

    size: int
    header_size: int
    header_xxh3_128: str


@dataclass(frozen=True)
class PieceRecord:
    """One box of a tensor: bytes ``begin <= offset < end`` of a file, row major, little endian."""

    file: str
    box: Box
    begin: int
    end: int
    xxh3_128: str

    def encode(self) -> dict[str, Any]:
        """Plain JSON values."""
        box = {"start": self.box.start, "shape": self.box.shape}
        return {"file": self.file, **box, "bytes": [self.begin, self.end], "xxh3_128": self.xxh3_128}

    @classmethod
    def decode(cls, raw: dict[str, Any]) -> "PieceRecord":
        """The inverse of ``encode``."""
        begin, end = raw["bytes"]
        return cls(raw["file"], Box(tuple(raw["start"]), tuple(raw["shape"])), begin, end, raw["xxh3_128"])


@dataclass(frozen=True)
class TensorRecord:
    """One global tensor and the pieces that tile it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the tensor bytes; ``meta`` is whatever JSON the caller gave."""

    step: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    meta: dict[str, Any]

    def encode(self) -> bytes:
        """The file's bytes: one line per file and per tensor."""
        files = {name: asdict(record) for name, record in self.files.items()}
        tensors = {
            name: {"dtype": t.dtype, "shape": t.shape, "pieces": [piece.encode() for piece in t.pieces]}
            for name, t in self.tensors.items()
        }
        head = f'{{\n"format": {json.dumps(FORMAT)},\n"version": {VERSION},\n"step": {self.step},\n'
        body = f'"files": {_lines(files)},\n"tensors": {_lines(tensors)},\n"meta": {json.dumps(self.meta)},\n'
        text = f'{head}{body}"xxh3_128": "'.encode()
        return text + xxhash.xxh3_128_hexdigest(text).encode() + _TAIL

    @classmethod
    def decode(cls, raw: bytes, path: Path) -> "Manifest":
        """Check everything that can be checked without the shards.

        Raises:
            CheckpointError: damaged, of a newer version, or not consistent in itself; ``path`` is named.
        """
        end = len(raw) - len(_TAIL)
        text, digest = raw[: end - 32], raw[end - 32 : end]
        if end < 32 or raw[end:] != _TAIL or digest != xxhash.xxh3_128_hexdigest(text).encode():
            raise CheckpointError(
                f"{path}: the manifest is damaged (its own checksum does not match); use another step"
            )
        try:
            return cls._understand(json.loads(raw), path)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: the manifest is not understood: {error!r}") from error

    @classmethod
    def _understand(cls, raw: dict[str, Any], path: Path) -> "Manifest":
        if raw["format"] != FORMAT or not _natural(raw["version"]):
            raise ValueError(f"format is {raw['format']!r}, version {raw['version']!r}")
        if raw["version"] > VERSION:
            raise CheckpointError(
                f"{path}: written by a newer Weft (checkpoint format {raw['version']}, this Weft reads up to "
                f"{VERSION}); upgrade Weft to read it"
            )
        files = {name: FileRecord(**record) for name, record in raw["files"].items()}
        tensors = {
            name: TensorRecord(t["dtype"], tuple(t["shape"]), tuple(map(PieceRecord.decode, t["pieces"])))
            for name, t in raw["tensors"].items()
        }
        for name, file in files.items():
            sizes = _natural(file.size, file.header_size) and _DIGEST.fullmatch(file.header_xxh3_128)
            if not (sizes and _FILE.fullmatch(name)):
                raise ValueError(f"{name!r} is not the name of a file in this directory, or damaged sizes")
        for name, record in tensors.items():
            _check_tensor(name, record, files)
        if not _natural(raw["step"]) or not isinstance(raw["meta"], dict):
            raise ValueError("step is not a number or meta is not an object")
        return cls(raw["step"], files, tensors, raw["meta"])


def _lines(table: dict[str, Any]) -> str:
    rows = (f" {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
    return "{\n" + ",\n".join(rows) + "\n}"


def _natural(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_tensor(name: str, record: TensorRecord, files: dict[str, FileRecord]) -> None:
    if record.dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {record.dtype!r}")
    if not _natural(*record.shape):
        raise ValueError(f"tensor {name!r} has the shape {record.shape}")
    for piece in record.pieces:
        if not (_natural(*piece.box.start, *piece.box.shape) and piece.box.inside(record.shape)):
            raise ValueError(f"tensor {name!r}: {piece.box} does not lie in {record.shape}")
        file, begin, end = files[piece.file], piece.begin, piece.end
        if not (_natural(begin, end) and file.header_size <= begin <= end <= file.size):
            raise ValueError(f"tensor {name!r}: bytes {begin} to {end} do not lie in {piece.file}")
        if end - begin != piece.box.numel * DTYPES[record.dtype].itemsize:
            raise ValueError(f"tensor {name!r}: {end - begin} bytes for {piece.box}")
        if not _DIGEST.fullmatch(piece.xxh3_128):
            raise ValueError(f"tensor {name!r}: checksum {piece.xxh3_128!r}")
    if not tiles(record.shape, (piece.box for piece in record.pieces)):
        raise ValueError(f"tensor {name!r}: its pieces do not tile {record.shape}")


def check_plain(value: object, path: str = "meta") -> None:
    """Refuse what JSON would change silently (keys that are not text, NaN) or cannot hold.

    Tuples are allowed and come back as lists.

    Raises:
        CheckpointError: with the path of the first such value.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: the key {key!r} is not text, and JSON would change it")
            check_plain(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(item, f"{path}[{index}]")
    elif isinstance(value, float) and not -float("inf") < value < float("inf"):
        raise CheckpointError(f"{path}: {value} is not a JSON number")
    elif not isinstance(value, (str, int, float, type(None))):
        raise CheckpointError(f"{path}: a {type(value).__name__} is not JSON; tensors belong in pieces")
