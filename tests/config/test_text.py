"""YAML in and out: one meaning per scalar, exact round trip, lines, refusals."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.config.errors import ConfigError
from weft.config.text import dump, dump_value, parse, parse_file, parse_value

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        ["on", "010", "1:30", "1e-3", ".inf", "~", "", "2026-01-01", "0x1f", "true", "a: b", "#", "=", "<<"]
    ),
)
VALUES = st.dictionaries(
    st.text("abc_.1", min_size=1),
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_what_is_written_is_read_back(values: dict) -> None:
    again = parse(dump(values), "t.yaml").values
    assert again == values
    assert [type(v) for v in again.values()] == [type(v) for v in values.values()]


@settings(max_examples=100, deadline=None)
@given(SCALARS)
def test_one_value_on_one_line(value: object) -> None:
    again = parse_value(dump_value(value), "x")
    assert again == value
    assert type(again) is type(value)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_other_readers_see_our_strings_as_strings(text: str) -> None:
    assert yaml.safe_load(dump({"value": text})) == {"value": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("[0, .inf]", [0, math.inf]),
    ],
)
def test_scalars(text: str, value: object) -> None:
    got = parse_value(text, "x")
    assert got == value
    assert type(got) is type(value)


def test_lines() -> None:
    document = parse("a:\n  b: 1\n\n  c:\n  - 2\nd: {e: 3}\n", "t.yaml")
    assert document.values == {"a": {"b": 1, "c": [2]}, "d": {"e": 3}}
    assert document.lines == {"a": 1, "a.b": 2, "a.c": 4, "d": 6, "d.e": 6}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "a: is set twice, first at line 1; keep one (t.yaml:2)"),
        ("a: {b: 1, b: 2}", "a.b: is set twice"),
        ("a: [1", "t.yaml: line 1: not valid YAML"),
        ("- 1", "t.yaml: expected 'section: ...' lines, found [1]"),
        ("a: &x {b: *x}", "a.b: an alias leads back to its own section"),
        ("a: !!python/name:os.system x", "not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "not valid YAML: but found another document"),
        ("1: 2", "1: names are words, not 1"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "t.yaml")
    assert words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        parse_file(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        parse_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        parse_file(tmp_path)
