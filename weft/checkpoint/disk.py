"""Durable files: every change goes through ``os`` calls whose order survives a crash."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from weft.config.errors import RunError

CHUNK = 8 << 20  # bytes hashed, written or read at a time: stays in cache between hash and copy

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor."""
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: Path, parts: Iterable[memoryview]) -> None:
    """A new file with these bytes, on the medium when this returns (its directory entry is not)."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        for part in parts:
            while part:
                part = part[os.write(fd, part) :]
        os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def make_directories(path: Path) -> None:
    """A directory and its parents, durable."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for part in missing:
        sync_directory(part.parent)


def rename(source: Path, target: Path) -> None:
    """Move a directory beside itself, durably; the one step that commits or retires."""
    os.rename(source, target)
    sync_directory(target.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory that nothing refers to any more."""
    shutil.rmtree(path)


def lock(path: Path) -> int | None:
    """Hold a directory for one saving process until ``unlock`` or death; the descriptor to unlock.

    None if another process holds it. File systems without locks are taken as free.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(fd)
            return None
    return fd


def unlock(fd: int) -> None:
    """Release; said in words because a forked worker may share the descriptor."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def check_space(path: Path, need: int) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        RunError: fewer than ``need`` bytes are free.
    """
    if shutil.disk_usage(path).free < need:
        raise no_space(path, need)


def no_space(path: Path, need: int, reason: str = "") -> RunError:
    """The error for a full disk, a quota or a file size limit."""
    there = next(part for part in (path, *path.parents) if part.exists())
    have = shutil.disk_usage(there).free
    return RunError(
        f"no space{reason}: need {size(need)}, have {size(have)} at {path}; "
        "free some, lower checkpoint.most_recent_k or choose another run.dir"
    )


def trouble(error: OSError, path: Path, need: int) -> RunError:
    """What an operating system error means to a user who saves under ``path``."""
    if error.errno in _FULL:
        return no_space(path, need, f" ({error.strerror})")
    return RunError(f"cannot save at {error.filename or path}: {error.strerror}; check run.dir")


def size(count: float) -> str:
    """Bytes for people."""
    if count < 1000:
        return f"{count} bytes"
    units = ["TB", "GB", "MB", "kB"]
    while (count := count / 1000) >= 999.5 and len(units) > 1:
        units.pop()
    return f"{count:.3g} {units[-1]}"
