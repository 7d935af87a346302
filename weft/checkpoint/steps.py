"""The directory of checkpoints: which steps are committed, which were torn, which may go.

checkpoints/step_0000200/           committed: its manifest.json was there before it had this name
checkpoints/step_0000300.saving/    a save under way, or torn by a crash
checkpoints/step_0000100.removing/  a pruned step on its way out
"""

import logging
import re
from pathlib import Path

from weft.checkpoint import disk, manifest
from weft.config.errors import CheckpointError

LOG = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{7,})", re.ASCII)
_TORN = re.compile(r"step_\d{7,}\.(saving|removing)", re.ASCII)


def number(path: Path) -> int | None:
    """The step that a directory's name says; None if it is not a step directory's name."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def committed(root: Path) -> list[Path]:
    """Committed step directories, oldest step first."""
    found = [(number(path), path) for path in root.glob("step_*") if (path / manifest.NAME).is_file()]
    return [path for _, path in sorted((step, path) for step, path in found if step is not None)]


def latest(root: Path) -> Path | None:
    """The committed step directory with the highest step; None if there is none."""
    found = committed(root)
    return found[-1] if found else None


def check_free(root: Path, step: int) -> None:
    """Before a run starts after ``step`` (0: from nothing): refuse if its saves would meet later steps.

    Raises:
        CheckpointError: ``root`` holds a later step, which a save would find in its way hours from now.
    """
    newest = latest(root)
    if newest and (found := number(newest)) is not None and found > step:
        raise CheckpointError(
            f"{root} already holds step {found}, but this run starts after step {step} and never overwrites "
            "saved steps; resume with checkpoint.load=auto, choose another run.dir, or remove the later steps"
        )


def torn(root: Path) -> list[Path]:
    """What dead (or, while a save runs, live) saves left behind; the next save removes it."""
    return sorted(path for path in root.glob("step_*") if _TORN.fullmatch(path.name))


def sweep(root: Path) -> None:
    """Remove what dead saves left, and say so. Only for the holder of the lock."""
    for path in torn(root):
        LOG.warning("removing %s, left by a save that did not finish", path)
        disk.remove_tree(path)


def prune(root: Path, keep: int, newest: Path) -> None:
    """Remove all but the ``keep`` highest committed steps; never ``newest``, the one just committed.

    A step loses its name before its files, so that a crash leaves no half step under a step's name.
    """
    for path in committed(root)[:-keep] if keep > 0 else []:
        if path != newest:
            gone = path.with_name(f"{path.name}.removing")
            disk.rename(path, gone)
            disk.remove_tree(gone)
