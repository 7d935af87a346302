"""Reading a checkpoint: any box of any tensor, and never a byte that was not verified."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from weft.checkpoint import disk, manifest, steps
from weft.checkpoint.manifest import DTYPES, Manifest, PieceRecord, TensorRecord
from weft.checkpoint.shard import buffer
from weft.config.errors import CheckpointError
from weft.plan.box import Box
from weft.spec.param import ParamSpec


def open_checkpoint(path: Path) -> "Checkpoint":
    """A checkpoint by its run directory, checkpoints directory (the newest step) or step directory.

    Checks the manifest, and that every shard is there with the right size; tensors and shard headers are
    checked as they are read, or all by ``verify``.

    Raises:
        CheckpointError: nothing committed there, or damaged, or of a newer format.
    """
    step = _step_directory(path)
    held = step / manifest.NAME
    try:
        found = Manifest.decode(held.read_bytes(), held)
    except OSError as error:
        raise CheckpointError(f"{held}: the manifest cannot be read: {error.strerror}") from error
    if steps.number(step) not in (None, found.step):
        raise CheckpointError(f"{held}: the manifest is of step {found.step}; the directory was renamed")
    checkpoint = Checkpoint(step, found)
    problems = [text for name in found.files if (text := checkpoint.misfit(name))]
    if problems:
        raise CheckpointError("\n".join(problems))
    return checkpoint


def _step_directory(path: Path) -> Path:
    if (path / manifest.NAME).exists():
        return path
    step = steps.latest(path) or steps.latest(path / "checkpoints")
    if step is None:
        reason = "no committed checkpoint there" if path.is_dir() else "no such directory"
        torn = [place.name for place in (*steps.torn(path), *steps.torn(path / "checkpoints"))]
        left = f"; only saves that did not finish: {', '.join(torn)}" if torn else ""
        raise CheckpointError(f"{path}: {reason} (looked for {manifest.NAME} and step_NNNNNNN){left}")
    return step


class Checkpoint:
    """One committed step.

    Attributes:
        path: the step directory.
        step: the step's number.
        meta: what the saver gave (tuples come back as lists).
    """

    def __init__(self, path: Path, held: Manifest) -> None:
        self.path, self.step, self.meta = path, held.step, held.meta
        self._files, self._tensors = held.files, held.tensors
        self._checked: set[str] = set()  # files whose header was verified

    def names(self) -> list[str]:
        """All tensors, in the saver's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape."""
        return self._record(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as saved."""
        return DTYPES[self._record(name).dtype]

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A box of a tensor (all of it by default), assembled on the CPU, with its saved dtype.

        Every piece that meets the box is read whole and verified; on the host are at most the result and
        one piece.

        Raises:
            CheckpointError: no such tensor or box, or damage; file and tensor are named.
        """
        record = self._record(name)
        box = box or Box.whole(record.shape)
        if not box.inside(record.shape):
            raise CheckpointError(f"{self.path}: tensor {name!r} of shape {record.shape} has no {box}")
        result = torch.empty(box.shape, dtype=DTYPES[record.dtype])
        for piece in record.pieces:
            common = piece.box.overlap(box)
            if common is None:
                continue
            target = result[common.within(box)]
            if common == piece.box and target.is_contiguous():
                self._fill(name, piece, target)
            else:
                source = torch.empty(piece.box.shape, dtype=result.dtype)
                self._fill(name, piece, source)
                target.copy_(source[common.within(piece.box)])
        return result

    def verify(self) -> None:
        """Read every byte.

        Raises:
            CheckpointError: all damage found, one line for each file and tensor.
        """
        self._checked.clear()
        problems: dict[str, None] = {}
        for name, record in self._tensors.items():
            for piece in record.pieces:
                try:
                    self._fill(name, piece, torch.empty(piece.box.shape, dtype=DTYPES[record.dtype]))
                except CheckpointError as error:
                    problems[str(error)] = None
        if problems:
            raise CheckpointError("\n".join(problems))

    def misfit(self, file: str) -> str | None:
        """What is wrong with the presence and size of a shard, if anything."""
        place, size = self.path / file, self._files[file].size
        if not place.is_file():
            return f"{place}: this file of the checkpoint is missing"
        found = place.stat().st_size
        return f"{place}: has {found} bytes, the manifest says {size}" if found != size else None

    def _record(self, name: str) -> TensorRecord:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        return self._tensors[name]

    def _fill(self, name: str, piece: PieceRecord, target: Tensor) -> None:
        """Read one piece into a contiguous tensor and verify what is in memory then."""
        place = self.path / piece.file
        try:
            with disk.opened(place, os.O_RDONLY) as fd:
                self._check_header(fd, piece.file)
                digest = _read(fd, piece.begin, buffer(target))
        except OSError as error:
            raise CheckpointError(f"{place}: tensor {name!r} cannot be read: {error.strerror}") from error
        if digest != piece.xxh3_128:
            raise CheckpointError(
                f"{place}: tensor {name!r} is damaged (bytes {piece.begin} to {piece.end} have the checksum "
                f"{digest}, the manifest says {piece.xxh3_128}); use another step"
            )

    def _check_header(self, fd: int, file: str) -> None:
        if file in self._checked:
            return
        record = self._files[file]
        if _read(fd, 0, memoryview(bytearray(record.header_size))) != record.header_xxh3_128:
            raise CheckpointError(f"{self.path / file}: the header is damaged; use another step")
        self._checked.add(file)


def _read(fd: int, begin: int, into: memoryview) -> str:
    """Fill ``into`` from a file and return the checksum of what it then holds (less at the file's end)."""
    digest = xxhash.xxh3_128()
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done : done + disk.CHUNK]], begin + done)
        if not count:
            break
        digest.update(into[done : done + count])
        done += count
    return digest.hexdigest()


def match(
    checkpoint: Checkpoint, specs: Sequence[ParamSpec], prefix: str = "", others: Sequence[str] = ()
) -> None:
    """Check that the tensors under ``prefix`` are exactly those of a model. Dtypes may differ.

    Tensors of ``others``, modules that are not asked for, may lie there too.

    Raises:
        CheckpointError: every missing, surplus and misshapen tensor at once.
    """
    wanted = {f"{prefix}{spec.name}": spec.shape for spec in specs}
    besides = tuple(f"{prefix}{other}." for other in others)
    names = (name for name in checkpoint.names() if name.startswith(prefix) and not name.startswith(besides))
    held = {name: checkpoint.shape(name) for name in names}
    missing = [name for name in wanted if name not in held]
    surplus = [name for name in held if name not in wanted]
    other = [name for name, shape in wanted.items() if held.get(name, shape) != shape]
    problems = [f"{name}: missing, the model has it with shape {wanted[name]}" for name in missing]
    problems += [f"{name}: surplus, the model has no such tensor" for name in surplus]
    problems += [f"{name}: has shape {held[name]}, the model has {wanted[name]}" for name in other]
    if problems:
        count = f"{len(problems)} tensor{'s' if len(problems) > 1 else ''} that do not fit"
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{checkpoint.path} is a checkpoint of another model; {count}:\n{lines}")
