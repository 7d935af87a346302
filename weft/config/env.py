"""The only place that reads the process environment; ``torchrun`` and schedulers set these names."""

import os

from weft.config.errors import ConfigError, Problem


def rank() -> int:
    """``RANK``: number of this process among all; 0 without a launcher."""
    value = _whole("RANK", 0)
    if value >= world_size():
        message = f"{value} is outside WORLD_SIZE = {world_size()}; start all processes with torchrun"
        raise ConfigError([Problem("RANK", message)])
    return value


def world_size() -> int:
    """``WORLD_SIZE``: number of processes; 1 without a launcher."""
    return max(1, _whole("WORLD_SIZE", 1))


def local_rank() -> int:
    """``LOCAL_RANK``: number of this process on its machine; 0 without a launcher."""
    return _whole("LOCAL_RANK", 0)


def wants_traceback() -> bool:
    """``WEFT_TRACEBACK``: show Python's traceback instead of an error's message alone."""
    return os.environ.get("WEFT_TRACEBACK", "") not in {"", "0"}


def _whole(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        message = f"expected a whole number of at least 0 in the environment, not {text!r}"
        raise ConfigError([Problem(name, message)])
    return int(text or default)
