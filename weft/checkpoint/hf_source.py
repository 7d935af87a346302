"""Reading a Hugging Face model directory that nobody vouches for.

Nothing here runs code that comes with a model or unpickles anything, and no tensor is read before every
header has been found sound. Problems are collected, so that a user sees all of them at once.
"""

import json
import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.checkpoint.manifest import DTYPES
from weft.config.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
WEIGHTS = PICKLES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
FLOATS = {"F64", "F32", "F16", "BF16"}
HEADER_LIMIT = 100 << 20  # bytes; the limit of the safetensors format
SHOWN = 100  # problems listed one by one


@dataclass(frozen=True)
class Held:
    """One tensor of a file: its bytes are ``begin <= offset < end``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class Source:
    """A model directory.

    Attributes:
        path: where it is.
        tensors: by name.
        metadata: what each weight file says of itself.
        complete: every weight file could be read.
        problems: everything found wrong so far.
    """

    path: Path
    tensors: dict[str, Held] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False
    problems: list[str] = field(default_factory=list)
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict)

    def view(self, name: str) -> Tensor:
        """A tensor as a window on its file: pages are read when they are used, and nothing is kept."""
        held = self.tensors[name]
        if held.file not in self._maps:
            with held.file.open("rb") as file:
                self._maps[held.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._maps[held.file],
                dtype=DTYPES[held.dtype],
                count=math.prod(held.shape),
                offset=held.begin,
            )
        return flat.view(held.shape)

    def refusal(self, what: str) -> CheckpointError:
        """The error that lists every problem, one a line."""
        count = len(self.problems)
        lines = [f"{self.path} {what}; {count} problem{'s' if count > 1 else ''}, and nothing was written:"]
        lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
        if count > SHOWN:
            lines.append(f"  and {count - SHOWN} more")
        return CheckpointError("\n".join(lines))


def open_source(path: Path) -> Source:
    """The headers of every weight file; ``problems`` says what is wrong with them.

    Raises:
        CheckpointError: no directory there.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; name one with config.json and *.safetensors files")
    source = Source(path)
    listed = _weight_files(source)
    for name, keys in listed.items():
        file = path / name
        if not _inside(path, file):
            source.problems.append(f"{name}: leads out of the directory; only files inside it are read")
        elif not file.is_file():
            source.problems.append(f"{name}: this weight file is missing")
        else:
            _add(source, name, keys, _header(source, file))
    source.complete = not source.problems
    return source


def read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object, or None after saying why not. No key may stand twice."""
    try:
        return _object(path.read_bytes())
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: {error}")
    return None


def side_files(path: Path) -> Iterator[Path]:
    """Files beside the weights that travel with a model, relative to it: tokenizer, templates, licence."""
    extra = (path / "additional_chat_templates").glob("*.jinja")
    for file in sorted(chain(path.iterdir(), extra)):
        name = file.name
        skipped = name.startswith(".") or file.suffix in WEIGHTS or name.endswith(".index.json")
        if file.is_file() and not skipped and _inside(path, file):
            yield file.relative_to(path)


def _inside(path: Path, file: Path) -> bool:
    """Whether a file lies in the directory, or in the blob store of a Hugging Face cache around it."""
    home, place = path.resolve(), file.resolve()
    return place.is_relative_to(home) or place.parent == home.parent.parent / "blobs"


def _object(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {twice!r} stands twice")
        return table

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _weight_files(source: Source) -> dict[str, set[str] | None]:
    """Names of the weight files, each with the tensors that an index says it holds (None: no index)."""
    path, problems = source.path, source.problems
    index, single = path / INDEX, path / SINGLE
    if index.is_file() and single.is_file():
        problems.append(f"both {SINGLE} and {INDEX} are there; remove the one that does not belong")
    elif index.is_file():
        return _indexed(read_json(index, problems) or {}, problems)
    elif single.is_file():
        return {SINGLE: None}
    elif pickles := sorted(file.name for file in path.iterdir() if file.suffix in PICKLES):
        problems.append(
            f"{', '.join(pickles[:3])}: weights in pickles can run code when they are read and are refused; "
            "take the model's safetensors revision, or load and save_pretrained it with transformers where "
            "you trust it"
        )
    else:
        problems.append(f"no {SINGLE} and no {INDEX} there")
    return {}


def _indexed(index: dict[str, Any], problems: list[str]) -> dict[str, set[str] | None]:
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        problems.append(f"{INDEX}: has no weight_map")
        return {}
    listed: dict[str, set[str] | None] = {}
    bad: dict[str, None] = {}
    for key, name in table.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            bad[repr(name)] = None
        else:
            keys = listed.setdefault(name, set())
            if keys is not None:
                keys.add(key)
    problems += [f"{INDEX}: {name} is not the name of a safetensors file in this directory" for name in bad]
    return listed


def _add(source: Source, name: str, keys: set[str] | None, found: dict[str, Held]) -> None:
    for key, held in found.items():
        if key in source.tensors:
            source.problems.append(f"{key}: stands in both {source.tensors[key].file.name} and {name}")
        elif keys is not None and key not in keys:
            source.problems.append(f"{key}: stands in {name}, but the index does not say so")
        source.tensors.setdefault(key, held)
    if found:
        lost = sorted((keys or set()) - set(found))
        source.problems += [f"{key}: the index says it stands in {name}, but it does not" for key in lost]


def _header(source: Source, file: Path) -> dict[str, Held]:
    """The tensors of a safetensors file, whose bytes must be exactly what the header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise ValueError(f"truncated or not a safetensors file ({size} bytes, header of {length})")
            table = _object(stream.read(length))
        metadata = table.pop("__metadata__", {})
        source.metadata[file.name] = metadata if isinstance(metadata, dict) else {}
        held = {key: _entry(file, key, entry, 8 + length) for key, entry in table.items()}
        _check_tiling(held, 8 + length, size)
    except OSError as error:
        source.problems.append(f"{file.name}: cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        source.problems.append(f"{file.name}: {error}")
    else:
        return held
    return {}


def _entry(file: Path, key: str, entry: Any, base: int) -> Held:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **more}:
            if not more and all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                if dtype not in DTYPES:
                    raise ValueError(f"tensor {key!r} has the unknown dtype {dtype!r}")
                if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                    raise ValueError(f"tensor {key!r} of {dtype} {shape} cannot have {end - begin} bytes")
                return Held(file, dtype, tuple(shape), base + begin, base + end)
    raise ValueError(f"tensor {key!r} has the header {str(entry)[:80]}, which is not understood")


def _check_tiling(held: dict[str, Held], begin: int, size: int) -> None:
    for key, tensor in sorted(held.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != begin:
            raise ValueError(
                f"tensor {key!r} begins at byte {tensor.begin}, but the one before ends at {begin}"
            )
        begin = tensor.end
    if begin > size:
        raise ValueError(f"truncated: {size} bytes, but its header describes {begin}")
    if begin < size:
        raise ValueError(f"{size - begin} bytes follow the last tensor")
