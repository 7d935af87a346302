"""YAML text, strictly: one meaning per scalar, no duplicate names, and a line number for every value.

Scalars follow YAML 1.2: only ``true`` and ``false`` are booleans, ``010`` and ``1:30`` are strings, ``1e-3``
is a number. The writer quotes whatever either version of YAML would read as something else.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from weft.config.errors import ConfigError, Problem

_SCALARS = (
    ("bool", r"^(?:true|false)$", "tf"),
    ("int", r"^[-+]?(?:0|[1-9](?:_?[0-9])*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$",
        "-+.0123456789",
    ),
    ("float", r"^[-+]?\.inf$", "-+."),
    ("null", r"^(?:~|null)$", "~n"),
    ("null", r"^$", ""),
)


Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def _resolvers(known: Resolvers) -> Resolvers:
    """PyYAML's table of plain scalars by first letter ("" for an empty one): ``known``, then ours."""
    table = {letter: list(rows) for letter, rows in known.items()}
    for tag, pattern, letters in _SCALARS:
        for letter in letters or ("",):
            table.setdefault(letter, []).append((f"tag:yaml.org,2002:{tag}", re.compile(pattern)))
    return table


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers({})


class _Writer(yaml.SafeDumper):
    # YAML 1.1's table comes first, so that readers of either version see a string as a string.
    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Plain words as they are; control characters and odd spaces in double quotes, escaped."""
        return yaml.ScalarNode("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Writer.add_representer(str, _Writer.represent_text)


@dataclass(frozen=True)
class Document:
    """A parsed file: nested values, and ``lines[dotted path]`` of every name in it."""

    values: dict[str, Any]
    lines: dict[str, int]


@dataclass
class _Walk:
    reader: _Reader
    source: str
    lines: dict[str, int] = field(default_factory=dict[str, int])
    problems: list[Problem] = field(default_factory=list[Problem])

    def plain(self, node: yaml.Node, path: str, above: tuple[yaml.Node, ...] = ()) -> Any:
        """The value of ``node``; ``above`` are its ancestors, which an alias must not lead back to."""
        if node in above:
            self.blame(node, path, "an alias leads back to its own section")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, f"{path}[{i}]", (*above, node)) for i, item in enumerate(node.value)]
        return cast(Any, self.reader.construct_object(node))  # pyright: ignore[reportUnknownMemberType]

    def mapping(self, node: yaml.MappingNode, path: str, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            name: Hashable = self.plain(key, path, above)
            inner = f"{path}.{name}" if path else str(name)
            if not isinstance(name, str):
                self.blame(key, inner, f"names are words, not {name!r}")
            elif name in values:
                self.blame(key, inner, f"is set twice, first at line {self.lines[inner]}; keep one")
            else:
                self.lines[inner] = key.start_mark.line + 1
                values[name] = self.plain(value, inner, above)
        return values

    def blame(self, node: yaml.Node, path: str, message: str) -> None:
        self.problems.append(Problem(path, f"{message} ({self.source}:{node.start_mark.line + 1})"))


def parse(text: str, source: str) -> Document:
    """Parse a YAML mapping; ``source`` names it in messages.

    Raises:
        ConfigError: text that is not YAML, is not a mapping, or sets a name twice.
    """
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        walk = _Walk(reader, source)
        values: Any = {} if node is None else walk.plain(node, "")
    except yaml.YAMLError as error:
        raise ConfigError([Problem(source, _syntax(error))]) from None
    if not isinstance(values, dict):
        walk.problems.append(Problem(source, f"expected 'section: ...' lines, found {values!r}"))
    if walk.problems:
        raise ConfigError(walk.problems)
    return Document(cast(dict[str, Any], values), walk.lines)


def parse_file(path: str | Path) -> Document:
    """Parse the YAML file at ``path``.

    Raises:
        ConfigError: a file that cannot be read, or what ``parse`` refuses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem(str(path), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ConfigError([Problem(str(path), message)]) from None
    return parse(text, Path(path).name)


def parse_value(text: str, path: str) -> Any:
    """One value as YAML reads it: ``16``, ``1e-3``, ``true``, ``[1, 2]``, ``'text'``.

    Raises:
        ConfigError: text that is not YAML.
    """
    return parse(f"value: {text}", path).values["value"]


def dump(values: dict[str, Any]) -> str:
    """YAML text of nested plain values; ``parse`` gives them back exactly."""
    return yaml.dump(values, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=110)


def dump_value(value: Any) -> str:
    """One value on one line, as ``parse_value`` reads it."""
    text = yaml.dump(value, Dumper=_Writer, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("...\n").rstrip("\n")


def _syntax(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: not valid YAML: {error.problem or error.context}"
    return f"not valid YAML: {str(error).splitlines()[0]}"
