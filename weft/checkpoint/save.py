"""Saving a checkpoint: every rank writes its boxes, then one rename commits the step.

The laws, in the order of the code: all ranks agree on who writes what; what cannot fit is refused before
the first byte; files and directories are on the medium before the rename, and the rename before the call
returns; an error on one rank is the same error on all ranks, and leaves no partial directory; a committed
step is never written again: saving the same step once more is accepted only if it would write the same
manifest (the same bytes in the same shards with the same meta), and then changes nothing.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from weft.checkpoint import disk, manifest, shard, steps
from weft.checkpoint.manifest import DTYPE_NAMES, DTYPES, FileRecord, Manifest, PieceRecord, TensorRecord
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError, RunError, WeftError
from weft.parallel.comm import Comm
from weft.parallel.together import on_every
from weft.plan.box import Box, tiles

LOG = logging.getLogger(__name__)
T = TypeVar("T")


def save(
    root: Path, step: int, pieces: Sequence[Piece], meta: dict[str, Any], comm: Comm, keep: int = 0
) -> Path:
    """Commit ``root/step_NNNNNNN``; a collective call.

    Args:
        root: directory of checkpoints, on a file system that all ranks share.
        step: the step's number.
        pieces: what this rank holds. The boxes of all ranks must tile each tensor; of equal boxes the
            lowest rank's is written.
        meta: JSON values to store; rank 0's count.
        comm: all ranks that save.
        keep: after the commit, remove all but this many newest steps; 0 keeps all.

    Raises:
        CheckpointError: pieces that do not fit together, meta that is not JSON, another process saving
            into ``root``, or a committed step with other content.
        RunError: a full disk or another error of the file system.
    """
    return _Saving(root, step, pieces, meta, comm, keep).finish()


class AsyncSaver:
    """Saves in the background: a call copies what this rank writes to host memory and returns.

    ``comm`` must be for the saver alone (its own process group): the background thread uses it to commit,
    at any time. A background save that failed is logged at once and raised by the next ``save`` or
    ``wait``: end with ``wait``.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._path: Path | None = None

    def save(
        self, root: Path, step: int, pieces: Sequence[Piece], meta: dict[str, Any], comm: Comm, keep: int = 0
    ) -> None:
        """Begin what the function ``save`` does; waits for the save before this one.

        Raises:
            WeftError: the save before this one failed (then nothing is begun), or, as ``save`` has it,
                whatever shows before the first byte is written.
        """
        self.wait()
        saving = _Saving(root, step, pieces, meta, comm, keep)
        saving.stage()
        self._thread = threading.Thread(target=self._run, args=(saving,), name="checkpoint")
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the save under way; the last step that this saver committed.

        Raises:
            WeftError: it failed.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error
        return self._path

    def _run(self, saving: "_Saving") -> None:
        try:
            self._path = saving.finish()
        except BaseException as error:  # noqa: BLE001 - raised by the next call
            LOG.error("saving %s in the background failed: %s", saving.target, error)
            self._error = error


@dataclass(frozen=True)
class _Claim:
    """A piece without its values: what ranks tell one another."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    def encode(self) -> tuple[Any, ...]:
        """Plain JSON values."""
        return self.name, self.dtype, self.shape, self.box.start, self.box.shape

    @classmethod
    def decode(cls, raw: Sequence[Any]) -> "_Claim":
        """The inverse of ``encode``."""
        name, dtype, shape, *box = raw
        return cls(name, dtype, tuple(shape), Box(*map(tuple, box)))


_Shard = Sequence[Any]  # file name, its record, and tensor name and record of each piece, as JSON values


class _Saving:
    """One save on one rank, from the agreement of the ranks to the commit."""

    def __init__(
        self, root: Path, step: int, pieces: Sequence[Piece], meta: dict[str, Any], comm: Comm, keep: int
    ) -> None:
        self.root, self.step, self.meta, self.comm, self.keep = root, step, meta, comm, keep
        self.target = root / f"step_{step:07d}"
        self.draft = self.target.with_name(f"{self.target.name}.saving")
        self.need = 0
        self._lock: int | None = None
        claims = self._together(lambda: [_claim(piece).encode() for piece in pieces])
        self.tensors, owners = _assign([[_Claim.decode(raw) for raw in share] for share in claims])
        # 1024: what header and manifest say of a piece
        self.need = sum(claim.box.numel * DTYPES[claim.dtype].itemsize + 1024 for claim in owners)
        mine = {(claim.name, claim.box) for claim, rank in owners.items() if rank == comm.rank}
        self.files = shard.pack([piece for piece in pieces if (piece.name, piece.box) in mine])
        self._together(self._begin)

    def stage(self) -> None:
        """Copy what this rank writes to host memory of our own."""

        def copy() -> None:
            self.meta = deepcopy(self.meta)
            self.files = [
                [replace(piece, tensor=piece.tensor.detach().to("cpu", copy=True)) for piece in pieces]
                for pieces in self.files
            ]

        self._together(copy)

    def finish(self) -> Path:
        """Write, commit, prune."""
        shards = self._together(self._write)
        self._together(lambda: self._commit([record for records in shards for record in records]))
        self._release()
        return self.target

    def _begin(self) -> None:
        """Rank 0 makes the draft directory, if all fits."""
        if self.comm.rank:
            return
        if self.step < 0:
            raise CheckpointError(f"step {self.step} is negative")
        manifest.check_plain(self.meta)
        disk.make_directories(self.root)
        self._lock = disk.lock(self.root)
        if self._lock is None:
            raise CheckpointError(f"another process is saving into {self.root}; use another run.dir")
        steps.sweep(self.root)
        disk.check_space(self.root, self.need)
        self.draft.mkdir()

    def _write(self) -> list[_Shard]:
        if not self.draft.is_dir():
            raise RunError(f"{self.draft}, made by rank 0, is not there; ranks must share the file system")
        shards: list[_Shard] = []
        for index, pieces in enumerate(self.files):
            name = f"rank_{self.comm.rank:05d}_{index:03d}.safetensors"
            file, records = shard.write(self.draft / name, pieces, self.step)
            shards.append((name, asdict(file), [(tensor, record.encode()) for tensor, record in records]))
        return shards

    def _commit(self, shards: list[_Shard]) -> None:
        if self.comm.rank:
            return
        pieces: dict[str, list[PieceRecord]] = {name: [] for name in self.tensors}
        for _, _, records in shards:
            for name, record in records:
                pieces[name].append(PieceRecord.decode(record))
        tensors = {
            name: TensorRecord(claim.dtype, claim.shape, tuple(pieces[name]))
            for name, claim in self.tensors.items()
        }
        files = {name: FileRecord(**file) for name, file, _ in shards}
        raw = Manifest(self.step, files, tensors, self.meta).encode()
        if self.target.exists():
            self._accept(raw)
            return
        disk.write(self.draft / manifest.NAME, [memoryview(raw)])
        disk.sync_directory(self.draft)
        disk.rename(self.draft, self.target)
        try:
            steps.prune(self.root, self.keep, self.target)
        except OSError as error:  # the step is safe; the next save tries again
            LOG.warning("%s is saved, but an old step could not be removed: %s", self.target, error)

    def _accept(self, raw: bytes) -> None:
        """The step exists: all right if it is the same."""
        held = self.target / manifest.NAME
        if not held.is_file() or held.read_bytes() != raw:
            raise CheckpointError(
                f"{self.target} exists and differs from what would be saved; a saved step is never "
                "overwritten: remove it or choose another run.dir"
            )
        disk.remove_tree(self.draft)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What ``work`` returns on every rank; one error on all, and no draft, if it fails anywhere."""
        try:
            return on_every(self.comm, lambda: self._explained(work))
        except BaseException:  # also an interrupt or a lost rank
            self._abandon()
            raise

    def _explained(self, work: Callable[[], T]) -> T:
        """What ``work`` returns; whatever goes wrong in words for users."""
        try:
            return work()
        except WeftError:
            raise
        except OSError as error:
            raise disk.trouble(error, self.root, self.need) from error
        except Exception as error:
            raise RunError(f"saving {self.target} failed: {error!r}") from error

    def _abandon(self) -> None:
        if self._lock is not None and self.draft.exists():
            try:
                disk.remove_tree(self.draft)
            except OSError as error:
                LOG.warning("%s could not be removed: %s; the next save tries again", self.draft, error)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            disk.unlock(self._lock)
            self._lock = None


def _claim(piece: Piece) -> _Claim:
    dtype = DTYPE_NAMES.get(piece.tensor.dtype)
    if dtype is None:
        raise CheckpointError(f"tensor {piece.name!r}: {piece.tensor.dtype} is not a checkpoint dtype")
    if not piece.name or "[" in piece.name or piece.name == "__metadata__":
        raise CheckpointError(f"{piece.name!r} is not a tensor name (empty, reserved or with a bracket)")
    if not piece.box.inside(piece.shape):
        raise CheckpointError(f"tensor {piece.name!r}: {piece.box} does not lie in {piece.shape}")
    return _Claim(piece.name, dtype, piece.shape, piece.box)


def _assign(ranks: list[list[_Claim]]) -> tuple[dict[str, _Claim], dict[_Claim, int]]:
    """One claim per tensor, for its dtype and shape, and the rank that writes each distinct box.

    Raises:
        CheckpointError: ranks that disagree about a tensor, or boxes with holes or overlaps.
    """
    tensors: dict[str, _Claim] = {}
    owners: dict[_Claim, int] = {}
    boxes: dict[str, list[Box]] = {}
    for rank, claims in enumerate(ranks):
        if len({(claim.name, claim.box) for claim in claims}) < len(claims):
            raise CheckpointError(f"rank {rank} gives a box of a tensor twice")
        for claim in claims:
            first = tensors.setdefault(claim.name, claim)
            if (first.dtype, first.shape) != (claim.dtype, claim.shape):
                raise CheckpointError(
                    f"tensor {claim.name!r} is {first.dtype} {first.shape}, but {claim.dtype} {claim.shape} "
                    f"on rank {rank}"
                )
            if owners.setdefault(claim, rank) == rank:
                boxes.setdefault(claim.name, []).append(claim.box)
    for name, claim in tensors.items():
        if not tiles(claim.shape, boxes[name]):
            raise CheckpointError(f"tensor {name!r}: the boxes of all ranks do not tile {claim.shape}")
    return tensors, owners
