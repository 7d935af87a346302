"""Grids: the order of axes is law, and groups cut the ranks into parts."""

import math
import re
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.plan.grid import AXES, Grid, parse_ranks

sizes = st.lists(st.integers(1, 3), min_size=len(AXES), max_size=len(AXES))


def grid_of(each: list[int], seed: int) -> Grid:
    """Ranks in any order, some of the world left out."""
    count = math.prod(each)
    return Grid(tuple(Random(seed).sample(range(count + 2), count)), tuple(zip(AXES, each, strict=True)))


@given(sizes, st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_last_axis_is_the_fastest(each: list[int], seed: int) -> None:
    grid = grid_of(each, seed)
    for rank, place in zip(grid.ranks, product(*map(range, each)), strict=True):
        assert tuple(grid.coordinates(rank).values()) == place


@given(sizes, st.integers(0, 9), st.sets(st.sampled_from(AXES)))
@settings(max_examples=50, deadline=None)
def test_groups_partition_the_ranks(each: list[int], seed: int, axes: set[str]) -> None:
    grid, ordered = grid_of(each, seed), [axis for axis in AXES if axis in axes]
    groups = grid.groups(*ordered)
    assert sorted(rank for group in groups for rank in group) == sorted(grid.ranks)
    for group in groups:
        assert len(group) == grid.size(*ordered)
        for i, rank in enumerate(group):
            assert grid.group(rank, *ordered) == group
            assert grid.index(rank, *ordered) == i
            fixed = {axis: at for axis, at in grid.coordinates(rank).items() if axis not in axes}
            assert fixed.items() <= grid.coordinates(group[0]).items()


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("all", range(12)), ("0-3,8-11", [0, 1, 2, 3, 8, 9, 10, 11]), ("5", [5]), ("3,1", [3, 1])],
)
def test_rank_sets(text: str, ranks: list[int]) -> None:
    assert parse_ranks(text, 12) == tuple(ranks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-", "not of the form all, 0-7 or 0-3,8-11"),
        ("x", "not of the form"),
        ("", "not of the form"),
        ("0-3,3", "one twice"),
        ("3-0", "the lower end first"),
        ("0-99999999999", "names rank 99999999999, but there are 12 ranks (0 to 11)"),
    ],
)
def test_wrong_rank_sets(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_ranks(text, 12)
