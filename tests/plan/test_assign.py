"""Sequences to encoder ranks: every row once, rules kept, and loads that hardly differ."""

import random

import numpy as np
import pytest

from benchmarks import balance
from weft.plan.assign import Bins, assign, equal_counts, loads_of, spread
from weft.plan.items import Piece


def covered(bins: Bins, rows: list[int]) -> dict[int, list[int]]:
    """The bins of each sequence, whose parts are every row once, ascending like their bins."""
    at: dict[int, int] = {}
    where: dict[int, list[int]] = {}
    for i, pieces in enumerate(bins):
        assert list(pieces) == sorted(pieces)
        for piece in pieces:
            assert (piece.start, piece.whole) == (at.get(piece.sequence, 0), rows[piece.sequence])
            at[piece.sequence] = piece.stop
            where.setdefault(piece.sequence, []).append(i)
    assert at == dict(enumerate(rows))
    return where


def test_every_row_once_within_a_group_at_the_grain() -> None:
    for seed in range(300):
        choose = random.Random(seed)
        cp, count = choose.choice([1, 2, 4]), choose.choice([0, 1, 5, 40])
        skip, grain, size = choose.choice([0, 10]), choose.choice([1, 4]), cp * choose.randint(1, 4)
        rows = [skip + grain * choose.choice([0, 1, 3, 50, 400]) for _ in range(count)]
        costs = [float(n * (n + 100)) for n in rows]
        near = [choose.randrange(-1, size) for _ in rows]
        together = [choose.choice([-1, -1, 3, 4]) for _ in rows]
        given = {"cp": cp, "grain": grain, "skip": skip, "together": together}
        bins = assign(costs, size, rows=rows, near=near, **given)
        assert bins == assign(costs, size, rows=rows, near=near, **given)
        where = covered(bins, rows)
        for i, places in where.items():
            assert len({place // cp for place in places}) == 1
            assert len(places) == len(set(places)) == 1 or (costs[i] > sum(costs) / size / 4 and cp > 1)
        for key in (3, 4):
            assert len({place for i, k in enumerate(together) if k == key for place in where[i]}) <= 1
        cuts = [p for own in bins for p in own if p.start > 0]
        assert all((piece.start - skip) % grain == 0 and piece.start >= skip for piece in cuts)
        assert sum(loads_of(bins, costs)) == pytest.approx(sum(costs))


def test_large_sequences_are_cut_and_others_stay_near() -> None:
    costs, rows = [80.0, *[5.0] * 8], [80, *[5] * 8]
    bins = assign(costs, 4, rows=rows, cp=2)
    assert bins[:2] == ((Piece(0, 0, 40, 80),), (Piece(0, 40, 80, 80),))
    assert [[piece.sequence for piece in own] for own in bins[2:]] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    at_home = assign([1.0] * 8, 4, rows=[1] * 8, near=[3, 3, 3, 0, 0, 1, 2, -1])
    assert [[piece.sequence for piece in own] for own in at_home] == [[2, 3], [4, 5], [6, 7], [0, 1]]


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="cannot go to 3 bins in 2s"):
        assign([1.0], 3, rows=[1], cp=2)
    with pytest.raises(ValueError, match=r"told of as \[1, 2\]"):
        assign([1.0], 2, rows=[1, 2])


def test_loads_of_log_normal_sizes() -> None:
    """64 ranks, 16 sequences each; more ways and seeds are in the table of ``benchmarks/balance.py``."""
    ways = ("equal counts", 20), ("by cost, cp=8", 100), ("by cost, cp=8, near", 20)
    (equal, _), (cut, _), (near, kept) = (balance.measured(name, 16, seeds) for name, seeds in ways)
    assert np.percentile(cut, 95) <= 1.02
    assert np.percentile(near, 95) <= 1.02
    assert kept > 0.5
    assert np.mean(equal) > 2


def test_equal_counts() -> None:
    assert [len(own) for own in equal_counts(3, [5] * 7)] == [2, 2, 3]
    covered(equal_counts(4, [3, 4]), [3, 4])
    assert spread([0.0, 0.0]) == 1.0
