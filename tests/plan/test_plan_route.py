"""The laws of compiled routes over random ends, and what they say where no route exists."""

from collections import Counter

import numpy as np
import pytest

from tests.plan.routes import carried, even, numbers, random_pair, tokens, whole
from weft.plan.route import End, Leg, Route, check_route, compile_route, share, transpose
from weft.plan.runs import Run, count

PAIRS = 1000


def node(rank: int) -> int:
    return rank // 2


def compiled(seed: int) -> tuple[Route, End, End]:
    source, target = random_pair(seed)
    return compile_route(source, target, node if seed % 2 else None), source, target


def test_every_row_that_is_wanted_comes_once_and_only_where_it_lacks() -> None:
    for seed in range(PAIRS):
        route, source, target = compiled(seed)
        links = check_route(route, source, target)
        lacked = {
            rank: len(set(tokens(rows)) - set(tokens(source.holdings.get(rank, ()))))
            for rank, rows in target.holdings.items()
        }
        came = Counter[int]()
        for (_, to), rows in links.items():
            came[to] += rows
        assert {rank: came[rank] for rank in lacked} == lacked
        values = numbers(route.sources, seed)
        by_token = {
            t: values[r][i] for r, rows in source.holdings.items() for i, t in enumerate(tokens(rows))
        }
        for r, rows in source.holdings.items():  # replicas have the same values
            values[r] = np.array([by_token[t] for t in tokens(rows)]).reshape(-1, 2)
        for r, rows in carried(route, values).items():
            assert rows.tolist() == [by_token[t].tolist() for t in tokens(target.holdings[r])]


def test_the_transpose_is_the_transpose() -> None:
    """<R x, y> == <x, R^T y> in integers, and the way back of the way back is the way there."""
    for seed in range(PAIRS, 2 * PAIRS):
        route = compiled(seed)[0]
        back = transpose(route)
        x, y = numbers(route.sources, seed), numbers(route.targets, seed + 1)
        there, here = carried(route, x), carried(back, y)
        assert sum((there[r] * y[r]).sum() for r in y) == sum((here[r] * x[r]).sum() for r in x)
        assert transpose(back).legs == route.legs
        assert back.links == {(b, a): rows for (a, b), rows in route.links.items()}


def test_both_ends_take_rows_in_the_same_order() -> None:
    """The shares of all ranks, packed and unpacked, do what the legs say."""
    for seed in range(0, 2 * PAIRS, 5):
        route = compiled(seed)[0]
        for way in (route, transpose(route)):
            x, ranks = numbers(way.sources, seed), {*way.sources, *way.targets}
            shares = {rank: share(way, rank) for rank in ranks}
            out = {rank: np.zeros((rows, 2)) for rank, rows in way.targets.items()}
            for rank, own in shares.items():
                times = Counter(row for rows in own.receives.values() for row in tokens(rows))
                assert own.whole == (len(times) == own.want)
                assert own.once == (max(times.values(), default=1) == 1)
                for peer, rows in own.receives.items():
                    out[rank][tokens(rows)] += x[peer][tokens(shares[peer].sends[rank])]
            expected = carried(way, x)
            assert all((out[rank] == expected[rank]).all() for rank in expected)


def test_three_to_two() -> None:
    route = compile_route(even(12, [0, 1, 2]), even(12, [5, 6]))
    assert route.legs == (Leg(0, 0, 5, 0, 4), Leg(1, 0, 5, 4, 2), Leg(1, 2, 6, 0, 2), Leg(2, 0, 6, 2, 4))
    assert [route.party(rank) for rank in (0, 6, 9)] == [(0, 1, 2, 5, 6), (0, 1, 2, 5, 6), (9,)]
    assert transpose(route).party(0) == (5, 6, 0, 1, 2)


def test_the_identity_is_one_leg_for_each_pair() -> None:
    source, target = even(100, [0, 1, 2]), even(100, [3, 4, 5])
    halves = {r: (Run(h.start, 9), Run(h.start + 9, h.length - 9)) for r, (h,) in target.holdings.items()}
    assert compile_route(source, End(halves)).legs == compile_route(source, target).legs
    assert [leg[:4] for leg in compile_route(source, target).legs] == [(r, 0, r + 3, 0) for r in range(3)]
    assert compile_route(source, target).party(1) == (1, 4)


def test_replicas_send_evenly_and_the_nearest_first() -> None:
    every = compile_route(whole(90, [0, 1, 2]), whole(90, [3, 4, 5, 6]))
    sent = Counter[int]()
    for (source, _), rows in every.links.items():
        sent[source] += rows
    assert set(sent.values()) == {120}
    assert compile_route(whole(90, [0, 1, 2]), whole(90, [2, 3]), node).links == {(2, 3): 90}
    mixed = compile_route(whole(90, [0, 1, 2, 4]), whole(90, [3, 5, 6]), node)
    assert mixed.links == {(2, 3): 90, (4, 5): 90, (0, 6): 45, (1, 6): 45}
    same = compile_route(whole(90, [0, 1]), whole(90, [0, 1]))
    assert (same.links, len(same.legs)) == ({}, 2)


def test_overlapping_replicas_are_levelled() -> None:
    """Rank 1 has all rows, ranks 0 and 2 a part: it sends less of each part."""
    source = End({0: (Run(0, 60),), 1: (Run(0, 120),), 2: (Run(60, 60),)}, "replicated")
    sent = Counter[int]()
    for (one, _), rows in compile_route(source, even(120, [7])).links.items():
        sent[one] += rows
    assert sum(sent.values()) == 120
    assert max(sent.values()) <= 45


def test_nothing_to_move() -> None:
    for source, target in ((whole(0, [0]), whole(0, [1])), (whole(5, [0]), End({1: ()})), (End({}), End({}))):
        route = compile_route(source, target)
        assert route.legs == transpose(route).legs == ()
        assert check_route(route, source, target) == {}
    assert compile_route(even(1, [0, 1, 2]), even(1, [3, 4])).links == {(2, 4): 1}


def test_routes_that_do_not_exist_are_told() -> None:
    rows = even(10, [0, 1])
    short = End({0: (Run(0, 3),), 1: (Run(6, 2),)})
    with pytest.raises(
        ValueError, match="no rank of the source has rows 3 to 5 that rank 2 wants; rows 8 to 9 that"
    ):
        compile_route(short, even(10, [2]))
    with pytest.raises(ValueError, match="no rank of the source has rows 0 to 9 that rank 2 wants"):
        compile_route(End({0: ()}), even(10, [2]))
    twice = End({2: (Run(0, 4), Run(2, 4))}, "replicated")
    with pytest.raises(ValueError, match="rows 2 to 3 are on rank 2 of the target, twice"):
        compile_route(rows, twice)
    both = End({4: (Run(0, 4),), 3: (Run(3, 5),)})
    with pytest.raises(ValueError, match="row.* 3 to 3 are on ranks 3 and 4 of a unique source"):
        compile_route(both, rows)


def test_the_checker_sees_wrong_routes() -> None:
    source, target = even(12, [0, 1]), even(12, [1, 2])
    right = compile_route(source, target)
    assert check_route(right, source, target) == {(0, 1): 6, (1, 2): 6}
    for change, told in (
        (lambda t: t[1:], "is written 0 times"),
        (lambda t: np.concatenate([t, t[:1]]), "is written 2 times"),
        (lambda t: t + np.array([0, 1, 0, 0, 0]), "are wanted"),
        (lambda t: t + np.array([0, 0, 0, 0, 1]), "are wanted"),
    ):
        with pytest.raises(ValueError, match=told):
            check_route(Route(change(right.table), right.sources, right.targets), source, target)
    source, target = whole(4, [0, 1]), whole(4, [1])
    needless = Route(np.array([[0, 0, 1, 0, 4]]), {0: 4, 1: 4}, {1: 4})
    with pytest.raises(ValueError, match="rank 1 receives 4 rows but lacks only 0"):
        check_route(needless, source, target)


def test_rows_count() -> None:
    route, source, target = compiled(8)
    assert route.sources == {rank: count(rows) for rank, rows in source.holdings.items()}
    assert route.targets == {rank: count(rows) for rank, rows in target.holdings.items()}
