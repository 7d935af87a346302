"""Writing a directory whole or not at all, and safetensors shards in a stream."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from weft.checkpoint import disk
from weft.checkpoint.hf_source import INDEX, SINGLE
from weft.checkpoint.load import Checkpoint
from weft.checkpoint.manifest import DTYPE_NAMES
from weft.checkpoint.shard import PIECE_BYTES, buffer
from weft.config.errors import CheckpointError, RunError
from weft.models.hf_table import Link
from weft.plan.box import Box

SHARD_BYTES = 5_000_000_000
MADE = {"format": "pt", "producer": "weft"}  # transformers asks for the first; the second lets us replace it


@contextmanager
def draft(target: Path, replaceable: Callable[[Path], str] | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when all went well and disappears otherwise.

    Args:
        target: may be absent or empty; otherwise ``replaceable`` says why not (nothing: it may go).
        replaceable: asked about a target that holds something.

    Raises:
        CheckpointError: the target may not be replaced, or another process writes it.
        RunError: the file system is full or does not let us.
    """
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        reason = "it exists" if replaceable is None or not target.is_dir() else replaceable(target)
        if reason:
            raise CheckpointError(
                f"{target} cannot be written: {reason}; remove it or choose another directory"
            )
    made = target.with_name(f".{target.name}.weft-partial")
    try:
        disk.make_directories(target.parent)
        made.mkdir(exist_ok=True)
        held = disk.lock(made)
        if held is None:
            raise CheckpointError(f"another process is writing {target}")
        try:
            _clear(made)  # what a process that died left
            yield made
            _commit(made, target)
        except BaseException:
            if made.exists():
                disk.remove_tree(made)
            raise
        finally:
            disk.unlock(held)
    except OSError as error:
        where = error.filename or target
        raise RunError(
            f"cannot write {where}: {error.strerror}; free some space or write elsewhere"
        ) from error


def _clear(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            disk.remove_tree(entry)
        else:
            entry.unlink()


def _commit(made: Path, target: Path) -> None:
    for folder, _, _ in os.walk(made):
        disk.sync_directory(Path(folder))
    old = target.with_name(f".{target.name}.weft-replaced")
    if old.exists() and target.exists():
        disk.remove_tree(old)
    if target.exists() and any(target.iterdir()):
        os.rename(target, old)
    try:
        disk.rename(made, target)  # also over an empty directory
    except OSError:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    if old.exists():
        disk.remove_tree(old)


def write_file(path: Path, data: bytes) -> None:
    """A new durable file, in a directory that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, [memoryview(data)])


def write_weights(folder: Path, checkpoint: Checkpoint, links: Sequence[Link]) -> None:
    """Every published tensor of a checkpoint, in shards with an index, or in one file if that is enough."""
    shards = _shards(checkpoint, links)
    total = sum(_nbytes(checkpoint, link) for link in links)
    disk.check_space(folder, total)
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        disk.write(folder / name, _parts(checkpoint, shard))
        table |= {link.theirs: name for link in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _nbytes(checkpoint: Checkpoint, link: Link) -> int:
    return math.prod(link.shape) * checkpoint.dtype(f"model/{link.ours}").itemsize


def _shards(checkpoint: Checkpoint, links: Sequence[Link]) -> list[list[Link]]:
    """Links in files of at most SHARD_BYTES; wide dtypes first in each, so that tensors are aligned."""
    shards: list[list[Link]] = []
    room = 0
    for link in links:
        size = _nbytes(checkpoint, link)
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(link)
        room -= size
    for shard in shards:
        shard.sort(key=lambda link: -checkpoint.dtype(f"model/{link.ours}").itemsize)
    return shards


def _parts(checkpoint: Checkpoint, links: list[Link]) -> Iterator[memoryview]:
    """The bytes of one shard.

    Neighbouring links of one tensor are its rows in order, so rows stream from the checkpoint in blocks,
    whatever the published tensors are.
    """
    yield memoryview(_header(checkpoint, links))
    for (ours, _), group in groupby(links, key=lambda link: (link.ours, link.copy)):
        run = list(group)
        yield from _rows(checkpoint, f"model/{ours}", run[0].start[0], run[-1].start[0] + run[-1].size[0])


def _rows(checkpoint: Checkpoint, name: str, first: int, last: int) -> Iterator[memoryview]:
    shape = checkpoint.shape(name)
    row = math.prod(shape[1:]) * checkpoint.dtype(name).itemsize
    block = max(1, PIECE_BYTES // row)
    for begin in range(first, last, block):
        box = Box((begin, *(0 for _ in shape[1:])), (min(block, last - begin), *shape[1:]))
        yield buffer(checkpoint.read(name, box))


def _header(checkpoint: Checkpoint, links: list[Link]) -> bytes:
    table: dict[str, object] = {"__metadata__": MADE}
    end = 0
    for link in links:
        begin, end = end, end + _nbytes(checkpoint, link)
        dtype = DTYPE_NAMES[checkpoint.dtype(f"model/{link.ours}")]
        table[link.theirs] = {"dtype": dtype, "shape": link.shape, "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
