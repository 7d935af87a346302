"""Which back end each operation runs: ``fast`` unless ``use`` names another."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from weft.config.errors import WeftError

T = TypeVar("T")
_CHOSEN: dict[str, str] = {}


def pick(op: str, backends: Mapping[str, T]) -> T:
    """The back end of ``op`` in force.

    Raises:
        WeftError: the name given to ``use`` is none of ``backends``.
    """
    name = _CHOSEN.get(op, "fast")
    if name not in backends:
        raise WeftError(f"{op} has no back end {name!r}; use one of {', '.join(backends)}")
    return backends[name]


@contextmanager
def use(**names: str) -> Iterator[None]:
    """Run operations on named back ends inside the block: ``use(scan="reference")``."""
    before = dict(_CHOSEN)
    _CHOSEN.update(names)
    try:
        yield
    finally:
        _CHOSEN.clear()
        _CHOSEN.update(before)
