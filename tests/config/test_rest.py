"""Sections with names of the user's choice, and sections of several kinds."""

from dataclasses import dataclass
from typing import Literal

import pytest

from weft.config.base import Config, setting
from weft.config.errors import ConfigError
from weft.config.load import from_dict, from_yaml, to_dict, to_yaml
from weft.config.resolve import override_layer, resolve


@dataclass(frozen=True, kw_only=True)
class Square(Config):
    kind: Literal["square"] = setting("square", "")
    side: int = setting(1, "", ge=1)


@dataclass(frozen=True, kw_only=True)
class Disc(Config):
    kind: Literal["disc"] = setting("disc", "")
    radius: float = setting(1.0, "", gt=0)


@dataclass(frozen=True, kw_only=True)
class Plot(Config):
    ranks: int = setting(1, "", ge=1)


@dataclass(frozen=True, kw_only=True)
class Plots(Config):
    main: Plot = setting(Plot, "")
    others: dict[str, Plot] = setting(dict, "", rest=True)


@dataclass(frozen=True, kw_only=True)
class Whole(Config):
    shapes: dict[str, Square | Disc] = setting(dict, "")
    plots: Plots = setting(Plots, "")


VALUES = {
    "shapes": {"a": {"kind": "square", "side": 3}, "b": {"kind": "disc", "radius": 2.0}},
    "plots": {"main": {"ranks": 2}, "left": {"ranks": 4}},
}


def test_both_are_read_and_written_back() -> None:
    whole = from_dict(Whole, VALUES)
    assert whole.shapes == {"a": Square(side=3), "b": Disc(radius=2.0)}
    assert whole.plots.others == {"left": Plot(ranks=4)}
    assert to_dict(whole) == VALUES
    assert from_yaml(Whole, to_yaml(whole)) == whole


def test_overrides_reach_inside() -> None:
    base = from_dict(Whole, VALUES)
    words = ["shapes.a.side=5", "plots.left.ranks=8", "plots.right.ranks=2"]
    found = resolve(base, [override_layer(Whole, words)], "recipe x")
    assert found.config.shapes["a"] == Square(side=5)
    assert found.config.plots.others == {"left": Plot(ranks=8), "right": Plot(ranks=2)}
    assert found.origins["plots.right.ranks"] == "command line"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("shapes.a.side=0", "shapes.a.side: 0 is out of range; it must be at least 1"),
        ("shapes.b.radius=-1", "shapes.b.radius: -1.0 is out of range"),
        ("shapes.c.side=1", "shapes.c.kind: expected one of square, disc, not nothing"),
        ("shapes.a.sides=1", "shapes.a.sides: unknown name"),
        ("plots.left.ranks=0", "plots.left.ranks: 0 is out of range"),
        ("plots.left.rank=2", "plots.left.rank: unknown name; did you mean plots.left.ranks"),
        ("plots.ranks=2", "plots.ranks: unknown name; did you mean plots.main.ranks"),
    ],
)
def test_refusals_name_the_place(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(from_dict(Whole, VALUES), [override_layer(Whole, [words])], "recipe x")
    assert said in str(error.value)
