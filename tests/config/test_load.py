"""The strict loader: types, defaults, sections, all problems at once, exact round trip."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.config.base import Config, setting
from weft.config.errors import ConfigError, Problem
from weft.config.load import annotation_at, from_dict, from_yaml, paths, to_dict, to_yaml
from weft.recipes.registry import RECIPES
from weft.spec.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Part(Config):
    width: int = setting(doc="how wide", ge=1)
    share: float = setting(0.5, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class Whole(Config):
    name: str = ""
    on: bool = False
    kind: Literal["a", "b", 3] = "a"
    limit: int | None = None
    pair: tuple[float, float] = (0.0, math.inf)
    many: tuple[int, ...] = ()
    table: dict[str, float] = setting(dict)
    part: Part
    spare: Part = Part(width=2)

    def check(self) -> Iterator[Problem]:
        if self.limit is not None and self.limit < self.part.width:
            yield Problem("limit", f"{self.limit} is below part.width = {self.part.width}")


GIVEN = {
    "name": "x",
    "on": True,
    "kind": 3,
    "limit": 9,
    "pair": [1, "1e-3"],
    "many": [1, 2, 3],
    "table": {"k": 1},
    "part": {"width": 3},
}


def problems(values: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_dict(Whole, values)
    return [str(problem) for problem in caught.value.problems]


def test_every_kind_of_value() -> None:
    got = from_dict(Whole, GIVEN)
    part = Part(width=3)
    want = Whole(
        name="x", on=True, kind=3, limit=9, pair=(1.0, 1e-3), many=(1, 2, 3), table={"k": 1.0}, part=part
    )
    assert got == want
    assert type(got.pair[0]) is float


def test_round_trip_keeps_every_bit() -> None:
    config = Whole(
        pair=(0.1 + 0.2, -math.inf), many=(1,), table={"a.b": 1e-300}, part=Part(width=7, share=1 / 3)
    )
    assert from_yaml(Whole, to_yaml(config)) == config
    assert from_dict(Whole, to_dict(config)) == config


@given(
    st.floats(allow_nan=False), st.text(st.characters(exclude_categories=["Cs"])), st.integers(min_value=1)
)
def test_round_trip_of_any_leaf(number: float, text: str, whole: int) -> None:
    config = Whole(name=text, pair=(number, 0.0), part=Part(width=whole))
    assert from_yaml(Whole, to_yaml(config)) == config


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_of_recipes(name: str) -> None:
    config = RECIPES[name]()
    assert from_yaml(RunConfig, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "name: expected text, not 3; quote it: '3'"),
        ({"name": None}, "name: expected text, not nothing"),
        ({"on": "yes"}, "on: expected true or false, not 'yes'"),
        ({"on": 1}, "on: expected true or false, not 1"),
        ({"kind": "c"}, "kind: expected one of a, b, 3, not 'c'"),
        ({"kind": True}, "kind: expected one of a, b, 3, not True"),
        ({"limit": 1.5}, "limit: expected a whole number, not 1.5"),
        ({"limit": 9.0}, "limit: expected a whole number, not 9.0; write 9"),
        ({"limit": True}, "limit: expected a whole number, not True"),
        ({"limit": 2}, "limit: 2 is below part.width = 3"),
        ({"pair": [1.0]}, "pair: expected 2 values, not 1"),
        ({"pair": [1.0, "x"]}, "pair[1]: expected a number, not 'x'"),
        ({"pair": [1.0, math.nan]}, "pair[1]: expected a number, not nan"),
        ({"pair": [1.0, 10**400]}, "pair[1]: expected a number, not 1"),
        ({"pair": 1.0}, "pair: expected a list such as [a, b], not 1.0"),
        ({"many": [1, True]}, "many[1]: expected a whole number, not True"),
        ({"table": [1]}, "table: expected names with values, such as {name: value}, not [1]"),
        ({"table": {"k": "x"}}, "table.k: expected a number, not 'x'"),
        ({"table": {1: 1.0}}, "table: names are words, not 1"),
        ({"part": 3}, "part: is a section, not 3; set its members, for example part.width"),
        ({"part": {}}, "part.width: is missing and has no default: how wide"),
        ({"part": {"width": 0}}, "part.width: 0 is out of range; it must be at least 1"),
        ({"part": {"width": "0"}}, "part.width: expected a whole number of at least 1, not '0'"),
        (
            {"part": {"width": 1, "share": 1}},
            "part.share: 1.0 is out of range; it must be at least 0 and less than 1",
        ),
        ({"part": {"width": 1, "share": math.inf}}, "part.share: inf is not a finite number"),
        ({"part": {"width": 1, "shares": 1}}, "part.shares: unknown name; did you mean part.share?"),
        ({"width": 1}, "width: unknown name; did you mean part.width or spare.width?"),
        ({"zzz": 1}, "zzz: unknown name; the top level has name, on, kind"),
    ],
)
def test_refusals(change: dict, said: str) -> None:
    (problem,) = problems(GIVEN | change)
    assert problem.startswith(said)


def test_missing_section_names_its_missing_settings() -> None:
    assert problems({}) == ["part.width: is missing and has no default: how wide"]


def test_all_problems_at_once() -> None:
    found = problems(
        {"name": 1, "on": 2, "part": {"width": 0, "wide": 3}, "spare": {"width": 1, "share": 2.0}, "q": 1}
    )
    assert [line.split(":")[0] for line in found] == [
        "q",
        "name",
        "on",
        "part.wide",
        "part.width",
        "spare.share",
    ]


def test_problems_in_unread_sections_do_not_hide_limits_beside_them() -> None:
    found = problems({"part": {"width": 0, "share": "x"}})
    assert [line.split(":")[0] for line in found] == ["part.share", "part.width"]


def test_annotations_that_text_cannot_give_are_a_programming_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Config):
        value: int | str = 3
        other: set[int] = setting(set)

    with pytest.raises(TypeError, match="one type and None"):
        from_dict(Odd, {"value": 3})
    with pytest.raises(TypeError, match="cannot be read from text"):
        from_dict(Odd, {"other": [3]})


def test_paths_and_annotations() -> None:
    assert list(paths(Part)) == ["width", "share"]
    assert "part.width" in list(paths(Whole))
    assert annotation_at(Whole, "part.width") is int
    assert annotation_at(Whole, "part.w") is None
    assert annotation_at(Whole, "name.width") is None
    assert annotation_at(Whole, "nope.width") is None
