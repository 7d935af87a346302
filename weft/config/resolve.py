"""Layers over a base config: a YAML file, then the command line; every value remembers where it came from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, get_args, get_origin

from weft.config.base import Config
from weft.config.errors import ConfigError, Problem
from weft.config.load import annotation_at, defaults, is_section, read, to_dict
from weft.config.text import parse_file, parse_value

C = TypeVar("C", bound=Config)
Values = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """Nested plain values, the origin of each dotted path in them, and what could not be read at all."""

    values: Values
    origins: Mapping[str, str]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A checked config, and where each leaf is from: default, a recipe, ``run.yaml:12``, command line."""

    config: C
    origins: dict[str, str]


def file_layer(path: str | Path) -> Layer:
    """The layer of a YAML file."""
    try:
        document = parse_file(path)
    except ConfigError as error:
        return Layer({}, {}, error.problems)
    name = Path(path).name
    return Layer(document.values, {place: f"{name}:{line}" for place, line in document.lines.items()})


def override_layer(kind: type[Config], arguments: Sequence[str]) -> Layer:
    """The layer of ``section.name=value`` arguments; a later one wins.

    ``section=FILE.yaml`` takes the whole section from a file: what the file leaves out is the default.
    """
    values: Values = {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    for argument in arguments:
        path, equals, text = argument.partition("=")
        if not equals or not all(path.split(".")):
            problems.append(
                Problem(argument, "expected section.name=value, for example train.train_iters=100")
            )
            continue
        try:
            annotation = annotation_at(kind, path)
            value = _override_value(annotation, path, text)
            if is_section(annotation) and isinstance(value, str):
                value, lines = _section_file(annotation, path, value)
                origins |= lines
        except ConfigError as error:
            problems += error.problems
            continue
        _merge(values, _nest(path.split("."), value))
        origins[path] = "command line"
    return Layer(values, origins, tuple(problems))


def resolve(base: C, layers: Sequence[Layer], origin: str) -> Resolved[C]:
    """``base``, which is from ``origin``, with ``layers`` over it, rebuilt and checked strictly.

    Raises:
        ConfigError: every problem at once, each with the file and line (or command line) that set the value.
    """
    values = to_dict(base)
    usual = dict(leaves(defaults(type(base))))
    origins = {
        path: "default" if path in usual and usual[path] == v else origin for path, v in leaves(values)
    }
    given: dict[str, str] = {}
    for layer in layers:
        _merge(values, layer.values)
        given |= {path: _origin(layer, path) for path, _ in leaves(layer.values)}
    unread = [problem for layer in layers for problem in layer.problems]
    config, problems = read(type(base), values)
    if config is None or problems or unread:
        raise ConfigError([*unread, *(located(problem, given) for problem in problems)])
    origins |= given
    found = {path: origins.get(path, "default") for path, _ in leaves(to_dict(config))}
    return Resolved(config, found)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of everything that is not a section."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _override_value(annotation: Any, path: str, text: str) -> Any:
    """Text settings take the words as they are (``data.glob=*.py``); all others are YAML."""
    if _is_text(annotation) and not text.startswith(("'", '"')):
        return text
    return parse_value(text, path)


def _section_file(kind: type[Config], path: str, file: str) -> tuple[Values, dict[str, str]]:
    """Values and origins of a section that is a file of its own."""
    if not Path(file).is_file():
        fix = f"set {path}.<name>=value, or a whole file, {path}=FILE.yaml (there is no file {file})"
        raise ConfigError([Problem(path, f"is a section, not {file!r}; {fix}")])
    document, name = parse_file(file), Path(file).name
    values = defaults(kind)
    origins = {f"{path}.{place}": "default" for place, _ in leaves(values)}
    _merge(values, document.values)
    return values, origins | {f"{path}.{place}": f"{name}:{n}" for place, n in document.lines.items()}


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(item, str) for item in get_args(annotation))
    return annotation is str


def _nest(names: Sequence[str], value: Any) -> Values:
    return {names[0]: _nest(names[1:], value) if len(names) > 1 else value}


def _merge(values: Values, over: Mapping[str, Any]) -> None:
    for name, value in over.items():
        below = values.get(name)
        if isinstance(below, dict) and isinstance(value, Mapping):
            _merge(cast(Values, below), cast(Mapping[str, Any], value))
        else:
            values[name] = value


def _origin(layer: Layer, path: str) -> str:
    """Origin of ``path``, or of the nearest section above it."""
    while path not in layer.origins and "." in path:
        path = path.rpartition(".")[0]
    return layer.origins[path]


def located(problem: Problem, origins: Mapping[str, str]) -> Problem:
    """The problem with the file and line (or command line) that set its value, or a value inside its section.

    What is from a default or a recipe is not named.
    """
    path = problem.path.partition("[")[0]
    inside = (origin for place, origin in origins.items() if place.startswith(f"{path}.") and _given(origin))
    origin = origins.get(path) or next(inside, None)
    return Problem(problem.path, f"{problem.message} ({origin})") if origin and _given(origin) else problem


def _given(origin: str) -> bool:
    return origin != "default" and not origin.startswith("recipe ")
