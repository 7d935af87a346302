"""Errors users see.

    WeftError
    ├── ConfigError       impossible or unknown settings, all collected, before any work
    ├── DataError         a corpus, tokenizer or index that cannot be used
    ├── CheckpointError   a checkpoint that is damaged, incomplete or of another model
    └── RunError          a run that must stop (NaN loss, no disk space, ...)

Every message names the value, the limit and the fix.
"""

from collections.abc import Iterable
from dataclasses import dataclass


class WeftError(Exception):
    """Base of every error Weft raises for its users."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one setting: ``path`` is dotted, ``message`` names value, limit and fix."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message

    def under(self, prefix: str) -> "Problem":
        """The same problem seen from the parent section ``prefix``."""
        return Problem(f"{prefix}.{self.path}" if self.path else prefix, self.message)


class ConfigError(WeftError):
    """All problems of a configuration at once."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration:"
        lines = (line for problem in self.problems for line in _indented(str(problem)))
        super().__init__("\n".join([head, *lines]))


def _indented(text: str) -> list[str]:
    """The lines of a problem, those after the first under it."""
    first, *rest = text.splitlines() or [""]
    return [f"  {first}", *(f"    {line}" for line in rest)]


class DataError(WeftError):
    """A corpus, tokenizer or index file that cannot be used."""


class CheckpointError(WeftError):
    """A checkpoint that is damaged, incomplete or belongs to another model."""


class RunError(WeftError):
    """A run that must stop."""
