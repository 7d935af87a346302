"""The frozen configuration base: fields that carry their own documentation and limits."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, cast

from weft.config.errors import Problem


def setting(
    default: Any = MISSING,
    doc: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    dim: str = "",
    rest: bool = False,
) -> Any:
    """A documented dataclass field; ``ge/gt/le/lt`` bound a number (units belong in ``doc``).

    A default that is a class or function is called for each new object, like a ``default_factory``.
    ``dim`` names the dimension that a count counts, so that a layout can cut it (``weft.plan.shard``).
    ``rest`` marks a table that takes every name of its section that is not a field; users do not write its
    own name.
    """
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    limits = {key: value for key, value in limits.items() if value is not None}
    metadata = {"doc": doc, "limits": limits, "dim": dim, "rest": rest}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


_LIMITS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen tree of settings. Subclasses are ``@dataclass(frozen=True, kw_only=True)``."""

    def check(self) -> Iterator[Problem]:
        """Problems between fields; runs only when every number of this tree is within its limits."""
        return iter(())

    def problems(self) -> Iterator[Problem]:
        """Every problem of this tree: limits of the fields and sections below, then ``check``."""
        for f in fields(self):
            yield from member_problems(f, getattr(self, f.name))
        if self.within_limits():
            yield from self.check()

    def within_limits(self) -> bool:
        """Whether every number of this tree is within its field's limits."""
        values = ((f, getattr(self, f.name)) for f in fields(self))
        return all(
            all(section.within_limits() for section in sections.values())
            if (sections := sections_of(f, value))
            else not any(member_problems(f, value))
            for f, value in values
        )


def sections_of(f: Field[Any], value: Any) -> dict[str, Config]:
    """The sections that are the value of a field, or the entries of a table of them, by path."""
    if isinstance(value, Config):
        return {f.name: value}
    if not isinstance(value, Mapping):
        return {}
    table, prefix = cast(Mapping[str, Any], value), "" if f.metadata.get("rest") else f"{f.name}."
    return {prefix + name: entry for name, entry in table.items() if isinstance(entry, Config)}


def member_problems(f: Field[Any], value: Any) -> Iterator[Problem]:
    """Problems of one field: those of a section below, or a number outside its limits."""
    limits: dict[str, float] = f.metadata.get("limits", {})
    for path, section in sections_of(f, value).items():
        yield from (p.under(path) for p in section.problems())
    if isinstance(value, (int, float)) and not isinstance(value, bool) and limits:
        fault = "" if math.isfinite(value) else "not a finite number"
        if not all(_LIMITS[key][0](value, bound) for key, bound in limits.items()):
            fault = fault or "out of range"
        if fault:
            yield Problem(f.name, f"{value} is {fault}; it must be{limit_words(f).removeprefix(' of')}")


def limit_words(f: Field[Any]) -> str:
    """`` of at least 0 and less than 1``, or nothing for a field without limits."""
    limits: dict[str, float] = f.metadata.get("limits", {})
    return (
        " of " + " and ".join(f"{_LIMITS[key][1]} {bound}" for key, bound in limits.items()) if limits else ""
    )
