"""The strict loader: nested plain values to a frozen config tree, and back.

The tree is read from annotations. Nothing is guessed or dropped, and every problem is reported at once: a
wrong type, an unknown name (with the nearest known one), a missing value, a number out of range, a clash.
"""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from weft.config.base import Config, limit_words, member_problems
from weft.config.errors import ConfigError, Problem
from weft.config.suggest import nearest
from weft.config.text import dump, parse

C = TypeVar("C", bound=Config)


def from_dict(kind: type[C], values: Mapping[str, Any]) -> C:
    """Build and check a ``kind`` from nested plain values.

    Raises:
        ConfigError: every problem at once, each with its dotted path.
    """
    config, problems = read(kind, values)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def read(kind: type[C], values: Mapping[str, Any]) -> tuple[C | None, list[Problem]]:
    """The config (None if a value cannot be one) and every problem found."""
    reader = _Reader(kind)
    config = reader.section(kind, values, "")
    if config is _WRONG:
        return None, reader.problems
    return config, [*reader.problems, *config.problems()]


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values: dicts, lists and scalars."""
    values: dict[str, Any] = {}
    for f in fields(config):
        values |= _member(f, getattr(config, f.name))
    return values


def to_yaml(config: Config) -> str:
    """YAML text; ``from_yaml`` gives the same config back, bit for bit."""
    return dump(to_dict(config))


def from_yaml(kind: type[C], text: str, source: str = "config.yaml") -> C:
    """Read what ``to_yaml`` wrote.

    Raises:
        ConfigError: text or values that are not a ``kind``.
    """
    return from_dict(kind, parse(text, source).values)


def defaults(kind: type[Config]) -> dict[str, Any]:
    """Nested plain default values; settings without one are absent."""
    values: dict[str, Any] = {}
    for f in fields(kind):
        annotation = hints(kind)[f.name]
        if _has_default(f):
            value = f.default if f.default_factory is MISSING else f.default_factory()
            values |= _member(f, value)
        elif is_section(annotation):
            values[f.name] = defaults(annotation)
    return values


def annotation_at(kind: type[Config], path: str) -> Any:
    """The annotation of the setting at the dotted ``path``, or None if there is none."""
    name, _, below = path.partition(".")
    others = rest(kind)
    annotation = hints(kind).get(name, get_args(hints(kind)[others])[1] if others else None)
    if not below or annotation is None:
        return annotation
    return annotation_at(annotation, below) if is_section(annotation) else None


def paths(kind: type[Config], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings and sections."""
    for name, annotation in hints(kind).items():
        if name == rest(kind):
            continue
        yield prefix + name
        if is_section(annotation):
            yield from paths(annotation, f"{prefix}{name}.")


@cache
def hints(kind: type[Config]) -> dict[str, Any]:
    """Annotations of the settings of ``kind``, in order."""
    resolved = get_type_hints(kind)
    return {f.name: resolved[f.name] for f in fields(kind)}


def rest(kind: type[Config]) -> str:
    """The field of ``kind`` that takes what no other field is named; empty if there is none."""
    return next((f.name for f in fields(kind) if f.metadata.get("rest")), "")


def is_section(annotation: Any) -> bool:
    """Whether a setting is itself a ``Config``."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _has_default(f: Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def _member(f: Field[Any], value: Any) -> dict[str, Any]:
    """What a field adds to the plain values of its section."""
    return _plain(value) if f.metadata.get("rest") else {f.name: _plain(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in cast(tuple[Any, ...], value)]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast(Mapping[str, Any], value).items()}
    return value


def show(value: Any) -> str:
    """A value as messages name it."""
    return "nothing" if value is None else repr(value)


class _Wrong:
    """Marks a value that could not be read; its problem is recorded."""


_WRONG: Any = _Wrong()
_DEFAULT: Any = object()  # a setting that keeps its default


@dataclass
class _Reader:
    root: type[Config]
    problems: list[Problem] = field(default_factory=list[Problem])

    def wrong(self, path: str, message: str) -> Any:
        self.problems.append(Problem(path, message))
        return _WRONG

    def section(self, kind: type[Config], value: Any, path: str) -> Any:
        """A config, or _WRONG after recording every problem inside it."""
        if not isinstance(value, Mapping):
            example = f"{path}.{next(iter(hints(kind)))}"
            return self.wrong(
                path, f"is a section, not {show(value)}; set its members, for example {example}"
            )
        values, others = cast(Mapping[str, Any], value), rest(kind)
        if others:
            inside = {
                name for name in values if name not in hints(kind) and isinstance(values[name], Mapping)
            }
            known = {name: item for name, item in values.items() if name not in inside}
            values = {**known, others: {name: values[name] for name in values if name in inside}}
        for name in values:
            if name not in hints(kind):
                self.unknown(kind, path, str(name))
        members = {f.name: self.member(f, hints(kind)[f.name], values, path) for f in fields(kind)}
        if _WRONG not in members.values():
            return kind(**{name: item for name, item in members.items() if item is not _DEFAULT})
        for f in fields(kind):  # the whole cannot be built: check the parts that can
            found = member_problems(f, members[f.name])
            self.problems += [p.under(path) if path else p for p in found]
        return _WRONG

    def member(self, f: Field[Any], annotation: Any, values: Mapping[str, Any], path: str) -> Any:
        inner = f"{path}.{f.name}" if path else f.name
        if f.metadata.get("rest"):
            return self.table(get_args(annotation), values[f.name], path)
        if f.name in values:
            return self.value(annotation, values[f.name], inner, limit_words(f))
        if _has_default(f):
            return _DEFAULT
        if is_section(annotation):
            return self.section(annotation, {}, inner)
        return self.wrong(inner, f"is missing and has no default: {f.metadata.get('doc', '')}".rstrip(": "))

    def unknown(self, kind: type[Config], path: str, name: str) -> None:
        here = f"{path}." if path else ""
        places: dict[str, list[str]] = {}
        for place in paths(self.root):
            places.setdefault(place.rpartition(".")[2], []).append(place)
        near = [*places.get(name, ()), *(here + sibling for sibling in nearest(name, hints(kind)))]
        if not near and not path:
            near = [place for other in nearest(name, places) for place in places[other]]
        names = f"{path or 'the top level'} has {', '.join(hints(kind))}"
        hint = f"did you mean {' or '.join(near[:3])}?" if near else names
        self.wrong(here + name, f"unknown name; {hint}")

    def value(self, annotation: Any, value: Any, path: str, limits: str = "") -> Any:
        """``value`` as ``annotation`` says, or _WRONG."""
        if is_section(annotation):
            return self.section(annotation, value, path)
        if annotation in _SCALARS:
            result = _SCALARS[annotation](value)
            if result is not _WRONG:
                return result
            return self.wrong(
                path, f"{_EXPECTED[annotation]}{limits}, not {show(value)}{_advice(annotation, value)}"
            )
        origin = get_origin(annotation)
        readers = {Literal: self.choice, tuple: self.items, dict: self.table}
        readers |= {Union: self.optional, types.UnionType: self.optional}
        if origin not in readers:
            raise TypeError(f"{path}: settings annotated {annotation} cannot be read from text")
        return readers[origin](get_args(annotation), value, path)

    def choice(self, allowed: tuple[Any, ...], value: Any, path: str) -> Any:
        for item in allowed:
            if type(item) is type(value) and item == value:
                return item
        return self.wrong(path, f"expected one of {', '.join(map(str, allowed))}, not {show(value)}")

    def items(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, (list, tuple)):
            return self.wrong(path, f"expected a list such as [a, b], not {show(value)}")
        given = cast(tuple[Any, ...], value)
        many = len(kinds) == 2 and kinds[1] is Ellipsis
        if not many and len(given) != len(kinds):
            return self.wrong(path, f"expected {len(kinds)} values, not {len(given)}")
        each = [kinds[0]] * len(given) if many else kinds
        read_items = [
            self.value(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(each, given, strict=True))
        ]
        return _WRONG if _WRONG in read_items else tuple(read_items)

    def table(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self.wrong(path, f"expected names with values, such as {{name: value}}, not {show(value)}")
        entries = cast(Mapping[Any, Any], value)
        if bad := [key for key in entries if not isinstance(key, str)]:
            return self.wrong(path, f"names are words, not {bad[0]!r}")
        prefix = f"{path}." if path else ""
        read_items = {key: self.value(kinds[1], item, prefix + key) for key, item in entries.items()}
        return _WRONG if _WRONG in read_items.values() else read_items

    def optional(self, kinds: tuple[Any, ...], value: Any, path: str) -> Any:
        inner = [kind for kind in kinds if kind is not types.NoneType]
        if all(map(is_section, kinds)):
            return self.variant(kinds, value, path)
        if len(inner) != 1:
            raise TypeError(f"{path}: a setting has one type, or one type and None; not {kinds}")
        return None if value is None else self.value(inner[0], value, path)

    def variant(self, kinds: tuple[type[Config], ...], value: Any, path: str) -> Any:
        """One of several sections, which one is said by its ``kind``."""
        named = {word: kind for kind in kinds for word in get_args(hints(kind)["kind"])}
        word = cast(Mapping[str, Any], value).get("kind") if isinstance(value, Mapping) else None
        if word in named:
            return self.section(named[word], value, path)
        return self.wrong(f"{path}.kind", f"expected one of {', '.join(named)}, not {show(word)}")


def _integer(value: Any) -> Any:
    return value if type(value) is int else _WRONG


def _number(value: Any) -> Any:
    """A float; also an integer, or a string such as '1e-3' that other YAML readers leave as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _WRONG
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _WRONG
    return _WRONG if math.isnan(number) else number


def _boolean(value: Any) -> Any:
    return value if isinstance(value, bool) else _WRONG


def _string(value: Any) -> Any:
    return value if isinstance(value, str) else _WRONG


_SCALARS = {int: _integer, float: _number, bool: _boolean, str: _string}
_EXPECTED = {
    int: "expected a whole number",
    float: "expected a number",
    bool: "expected true or false",
    str: "expected text",
}


def _advice(kind: type, value: Any) -> str:
    if kind is str and value is not None and not isinstance(value, (list, dict)):
        return f"; quote it: '{value}'"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""
