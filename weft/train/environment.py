"""The facts of a run that its configuration does not say."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch

from weft import __version__


def environment(
    device: torch.device | None = None, source: Path | None = None
) -> dict[str, str | int | float]:
    """Versions, device, CPU and commit, as plain JSON values (sizes in GiB). No host, user or path names.

    Args:
        device: where the run computes; the CPU if not given.
        source: a file of the program whose git commit counts; this one if not given.
    """
    device = device or torch.device("cpu")
    facts: dict[str, str | int | float] = {"weft": __version__, "torch": torch.__version__}
    facts |= {
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    facts |= {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    facts |= {"device": str(device), "started": datetime.now(UTC).isoformat(timespec="seconds")}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        memory = round(gpu.total_memory / 2**30, 1)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": memory, "cuda": str(torch.version.cuda)}
    return facts | _commit(source or Path(__file__))


def _cpu() -> str:
    """Model of the processor; Linux tells it in a file, other systems through ``platform``."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(source: Path) -> dict[str, str]:
    """Commit that holds ``source``, marked if the tree has changes; nothing outside a repository."""
    commit = _git(source, "rev-parse", "HEAD")
    if not commit or not _git(source, "ls-files", source.name):
        return {}
    changed = _git(source, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit + (" with local changes" if changed else "")}


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source.resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
