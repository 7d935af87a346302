"""Shards: safetensors files of at most FILE_BYTES, written and hashed piece by piece."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from weft.checkpoint import disk
from weft.checkpoint.manifest import DTYPE_NAMES, FileRecord, PieceRecord
from weft.plan.box import Box

FILE_BYTES = 2 << 30
PIECE_BYTES = 256 << 20  # what reader and writer hold on the host at a time


@dataclass(frozen=True)
class Piece:
    """What one rank holds of the global tensor ``name``: the box at ``start`` with the tensor's shape.

    Attributes:
        name: global name.
        tensor: values of the box, on any device.
        shape: shape of the global tensor.
        start: where the box begins in the global tensor.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> "Piece":
        """A rank that holds all of a tensor."""
        return cls(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())

    @property
    def box(self) -> Box:
        """The box that the tensor fills."""
        return Box(self.start, tuple(self.tensor.shape))


def pack(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Cut pieces to PIECE_BYTES and distribute them over files of at most FILE_BYTES.

    Wide dtypes come first, so that every tensor of a file is aligned.
    """
    files: list[list[Piece]] = []
    room = 0
    for piece in sorted(pieces, key=lambda piece: -piece.tensor.itemsize):
        for part in _cut(piece):
            if not files or part.tensor.nbytes > room:
                files.append([])
                room = FILE_BYTES
            files[-1].append(part)
            room -= part.tensor.nbytes
    return files


def _cut(piece: Piece) -> Iterator[Piece]:
    tensor = piece.tensor
    if tensor.nbytes <= PIECE_BYTES or tensor.numel() == 1:
        yield piece
        return
    axis = next(axis for axis, size in enumerate(tensor.shape) if size > 1)
    size = tensor.shape[axis]
    rows = max(1, PIECE_BYTES * size // tensor.nbytes)
    for first in range(0, size, rows):
        start = (*piece.start[:axis], piece.start[axis] + first, *piece.start[axis + 1 :])
        part = tensor.narrow(axis, first, min(rows, size - first))
        yield from _cut(Piece(piece.name, part, piece.shape, start))


def buffer(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor, as bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write(path: Path, pieces: Sequence[Piece], step: int) -> tuple[FileRecord, list[tuple[str, PieceRecord]]]:
    """One shard, durable; its record, and names and records of its pieces."""
    header, offsets = _header(pieces, step)
    records: list[tuple[str, PieceRecord]] = []

    def parts() -> Iterator[memoryview]:
        yield memoryview(header)
        for piece, begin in zip(pieces, offsets, strict=True):
            data = buffer(piece.tensor.cpu().contiguous())
            digest = xxhash.xxh3_128()
            for first in range(0, len(data), disk.CHUNK):  # hash and write while the chunk is in cache
                digest.update(data[first : first + disk.CHUNK])
                yield data[first : first + disk.CHUNK]
            record = PieceRecord(path.name, piece.box, begin, begin + len(data), digest.hexdigest())
            records.append((piece.name, record))

    disk.write(path, parts())
    size = len(header) + sum(piece.tensor.nbytes for piece in pieces)
    return FileRecord(size, len(header), xxhash.xxh3_128_hexdigest(header)), records


def _header(pieces: Sequence[Piece], step: int) -> tuple[bytes, list[int]]:
    """The safetensors header with its length field, and the file offset of each piece."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", "weft_step": str(step)}}
    begins = [0]
    for piece in pieces:
        end = begins[-1] + piece.tensor.nbytes
        name = piece.name if piece.box.shape == piece.shape else f"{piece.name}[{str(piece.start)[1:-1]}]"
        entry = {"dtype": DTYPE_NAMES[piece.tensor.dtype], "shape": piece.box.shape}
        table[name] = entry | {"data_offsets": [begins[-1], end]}
        begins.append(end)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + begin for begin in begins[:-1]]
