"""Megatron's ``.bin/.idx`` pair, read and written; also the form of our own token cache.

``PREFIX.bin`` is every token, one after another. ``PREFIX.idx``, little endian, is::

    9 bytes   MMIDIDX and two zero bytes
    uint64    version, 1
    uint8     type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    uint64    sequences S
    uint64    entries D of the document index (documents + 1)
    int32[S]  tokens of each sequence
    int64[S]  where each sequence begins in .bin, in bytes
    int64[D]  the first sequence of each document, then S
    int8[S]   modes, only in multimodal files; not used here
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from weft.config.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SCAN = 1 << 22  # tokens or sequences looked at a time


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type Megatron gives to tokens of a vocabulary of this size."""
    return np.uint16 if vocab_size < 65_500 else np.int32


def prefix_of(path: str) -> Path:
    """``corpus``, ``corpus.bin`` and ``corpus.idx`` all name the pair ``corpus``."""
    return Path(path[:-4] if path.endswith((".bin", ".idx")) else path)


@runtime_checkable
class Bounds(Protocol):
    """Where each document begins, then the end; a list of integers is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, document: int, /) -> int: ...


class _FileBounds:
    """The bounds of a file's documents, read from the index when asked; nothing is kept."""

    def __init__(
        self, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, itemsize: int
    ) -> None:
        self._pointers, self._documents, self._itemsize = pointers, documents, itemsize
        self.end = int(pointers[-1]) // itemsize + int(lengths[-1]) if len(pointers) else 0

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, document: int) -> int:
        sequence = self._documents[document]
        return (
            self.end if sequence == len(self._pointers) else int(self._pointers[sequence]) // self._itemsize
        )


class _PartBounds:
    """The bounds of documents ``first .. last - 1`` alone."""

    def __init__(self, bounds: Bounds, first: int, last: int) -> None:
        self._bounds, self._first, self._last, self._shift = bounds, first, last, bounds[first]

    def __len__(self) -> int:
        return self._last - self._first + 1

    def __getitem__(self, document: int) -> int:
        return self._bounds[self._first + document] - self._shift


@dataclass(frozen=True)
class TokenFile:
    """A ``.bin/.idx`` pair, memory mapped. ``bounds[d]`` is where document ``d`` begins in ``tokens``."""

    prefix: Path
    tokens: Integer[np.ndarray, " tokens"]
    bounds: Bounds
    lengths: Integer[np.ndarray, " sequences"]
    pointers: Integer[np.ndarray, " sequences"]

    @property
    def documents(self) -> int:
        """Documents in the file."""
        return len(self.bounds) - 1

    def part(self, first: int, last: int) -> "TokenFile":
        """Documents ``first .. last - 1`` alone; nothing is read."""
        return replace(
            self,
            tokens=self.tokens[self.bounds[first] : self.bounds[last]],
            bounds=_PartBounds(self.bounds, first, last),
        )


def open_tokens(prefix: Path) -> TokenFile:
    """Open a pair and check both sizes; touches the header and the last entries only.

    Raises:
        DataError: a file is missing, is no such index, or is shorter or longer than its header says.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; a Megatron corpus is a pair {prefix}.bin and {prefix}.idx"
            )
    dtype, sequences, entries = _read_head(index)
    size, base = index.stat().st_size, _HEAD.size + 12 * sequences + 8 * entries
    if size not in (base, base + sequences):
        raise DataError(
            f"{index}: {size} bytes, but its header ({sequences} sequences, {entries - 1} documents) needs "
            f"{base}; it is truncated or damaged: copy or build it again"
        )

    def column(kind: type[np.integer], count: int, offset: int) -> np.ndarray:
        if not count:
            return np.empty(0, kind)
        return np.memmap(
            index, dtype=np.dtype(kind).newbyteorder("<"), mode="r", offset=offset, shape=(count,)
        )

    lengths = column(np.int32, sequences, _HEAD.size)
    pointers = column(np.int64, sequences, _HEAD.size + 4 * sequences)
    documents = column(np.int64, entries, _HEAD.size + 12 * sequences)
    if not entries or documents[0] != 0 or documents[-1] != sequences:
        raise DataError(
            f"{index}: the document index does not run from 0 to {sequences}; build the file again"
        )
    itemsize = np.dtype(dtype).itemsize
    bounds = _FileBounds(lengths, pointers, documents, itemsize)
    if data.stat().st_size != bounds.end * itemsize:
        raise DataError(
            f"{data}: {data.stat().st_size} bytes, but {index.name} needs {bounds.end * itemsize} "
            f"({bounds.end} tokens of {itemsize} bytes); it is truncated or belongs to another index"
        )
    tokens = np.memmap(data, dtype=dtype, mode="r") if bounds.end else np.empty(0, dtype)
    return TokenFile(prefix, tokens, bounds, lengths, pointers)


def _read_head(index: Path) -> tuple[type[np.integer], int, int]:
    with index.open("rb") as stream:
        head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise DataError(
            f"{index}: {len(head)} bytes, but the header alone needs {_HEAD.size}; it is truncated"
        )
    magic, version, code, sequences, entries = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise DataError(f"{index}: begins with {magic!r} instead of {_MAGIC!r}; this is no Megatron index")
    if version != 1:
        raise DataError(f"{index}: version {version}; only version 1 can be read")
    if code not in _DTYPES:
        raise DataError(f"{index}: type code {code} is no integer token type; known are {sorted(_DTYPES)}")
    return _DTYPES[code], sequences, entries


class TokenWriter:
    """Writes ``PREFIX.bin`` document by document, and ``PREFIX.idx`` when left without an error."""

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._bin: IO[bytes] = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 - closed in __exit__
        self._lengths = array("i")

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bin.close()
        if kind is None:
            self._write_index()

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document of one sequence."""
        self._bin.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.append(len(tokens))

    def _write_index(self) -> None:
        code = next(code for code, kind in _DTYPES.items() if np.dtype(kind) == self.dtype)
        lengths = np.array(self._lengths, "<i4")
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * self.dtype.itemsize
        with Path(f"{self.prefix}.idx").open("wb") as stream:
            stream.write(_HEAD.pack(_MAGIC, 1, code, len(lengths), len(documents)))
            stream.write(lengths.tobytes())
            stream.write(pointers.astype("<i8").tobytes())
            stream.write(documents.tobytes())


@dataclass(frozen=True)
class Scan:
    """What one full reading of a token file finds out."""

    counts: list[int]  # how often each id occurs, ids from 0
    longest: int  # tokens of the longest document
    bos_led: bool  # every document begins with the token asked for and has another after it
    digest: str  # of tokens and document lengths: the same text and tokenizer give the same digest anywhere


def scan(file: TokenFile, bos: int, limit: int) -> Scan:
    """Read all tokens of a file, or part of one, once: counts of ids, longest document, digest.

    Raises:
        DataError: an id is negative or not below ``limit``.
    """
    digest = blake2b(digest_size=16)
    counts = np.zeros(1, np.int64)
    for start in range(0, len(file.tokens), _SCAN):
        part = file.tokens[start : start + _SCAN].astype("<i8")
        for bad in (int(part.max()), int(part.min())):
            check_id(file.prefix, bad, limit)
        digest.update(part.tobytes())
        fresh = np.bincount(part, minlength=len(counts))
        fresh[: len(counts)] += counts
        counts = fresh
    longest, led = 0, file.documents > 0
    for document in range(file.documents):
        first, last = file.bounds[document], file.bounds[document + 1]
        longest = max(longest, last - first)
        led = led and last - first > 1 and int(file.tokens[first]) == bos
        digest.update((last - first).to_bytes(8, "little"))
    return Scan(counts.tolist(), longest, led, digest.hexdigest())


def check_id(prefix: Path, token: int, limit: int) -> None:
    """Refuse an id the model has no row for."""
    if not 0 <= token < limit:
        raise DataError(
            f"{prefix}.bin: holds token id {token}, but the model's vocabulary has {limit} tokens "
            f"(0 to {limit - 1}); raise model.vocab_size or use the tokenizer the model was made for"
        )


def check_pointers(file: TokenFile) -> None:
    """Refuse a whole file whose sequences do not follow one another; reads all of the index."""
    itemsize, expected = file.tokens.dtype.itemsize, 0
    for start in range(0, len(file.lengths), _SCAN):
        sizes = file.lengths[start : start + _SCAN].astype(np.int64) * itemsize
        ends = np.cumsum(sizes) + expected
        if np.any(file.pointers[start : start + _SCAN] != ends - sizes):
            raise DataError(f"{file.prefix}.idx: sequences do not follow one another in .bin; build it again")
        expected = int(ends[-1])
