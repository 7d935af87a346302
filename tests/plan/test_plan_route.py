"""The laws of compiled routes over random ends, and what they say where no route exists."""

import random
from collections import Counter

import numpy as np
import pytest

from tests.plan.routes import (
    KINDS,
    MOST,
    ORDERS,
    alike,
    carried,
    even,
    lower_bound,
    numbers,
    random_end,
    random_pair,
    samples,
    tokens,
    values,
    whole,
    zigzag,
)
from weft.plan.route import End, Leg, Route, check_route, compile_route, share, transpose
from weft.plan.runs import Run, count

PAIRS, PARTS, ROWS = 5000, 5, MOST


def node(rank: int) -> int:
    return rank // 2


def compiled(seed: int) -> tuple[Route, End, End]:
    source, target = random_pair(seed)
    return compile_route(source, target, node if seed % 2 else None), source, target


@pytest.mark.parametrize("part", range(PARTS))
def test_laws_of_routes(part: int) -> None:
    """All kinds of ends and orders: values arrive once, none travels needlessly, <R x, y> == <x, R^T y>."""
    for seed in range(part, PAIRS, PARTS):
        route, source, target = compiled(seed)
        links = check_route(route, source, target)
        assert sum(links.values()) == lower_bound(source, target)
        x, y = alike(source, numbers(route.sources, seed), ROWS), numbers(route.targets, seed + 1)
        out, meant = carried(route, x), values(source, x, ROWS)
        for rank, holding in target.holdings.items():
            if target.kind != "partial":
                assert (out[rank] == meant[tokens(holding)]).all()
        wanted = sorted({row for holding in target.holdings.values() for row in tokens(holding)})
        assert (values(target, out, ROWS)[wanted] == meant[wanted]).all()
        back = transpose(route)
        if len(wanted) == len({row for holding in source.holdings.values() for row in tokens(holding)}):
            check_route(back, target.dual, source.dual)
        here = carried(back, y)
        assert sum((out[r] * y[r]).sum() for r in y) == sum((here[r] * x[r]).sum() for r in x)
        assert (transpose(back).table == route.table).all()
        assert back.links == {(b, a): rows for (a, b), rows in links.items()}


def test_ends_are_the_same_however_they_are_told() -> None:
    """Columns in any order make the same end as a mapping."""
    draw = np.random.default_rng(0)
    for seed in range(300):
        for end in random_pair(seed):
            runs = [(rank, *run) for rank, own in end.holdings.items() for run in own or [Run(0, 0)]]
            rank, start, length = np.array(runs, np.int64).reshape(-1, 3).T
            other = draw.permutation(len(set(rank.tolist())))
            sort = np.argsort(other[np.unique(rank, return_inverse=True)[1]], kind="stable")
            again = End.of(rank[sort], start[sort], length[sort], end.kind)
            made = [compile_route(one, one) for one in (end, again)]
            assert made[0].legs == made[1].legs
            assert (made[0].sources, end.kind) == (made[1].sources, again.kind)
    nothing = np.zeros(0, np.int64)
    for kind in KINDS:
        assert End.of(nothing, nothing, nothing, kind).holdings == {}


def test_both_ends_take_rows_in_the_same_order() -> None:
    """The shares of all ranks, packed and unpacked, do what the legs say."""
    for seed in range(0, PAIRS, 10):
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


def test_summands_and_the_ranks_that_take_them() -> None:
    """Every target gets every summand; a partial target keeps its own, or takes its part."""
    assert compile_route(whole(6, [0, 1], "partial"), whole(6, [1, 2])).links == {
        (0, 1): 6, (0, 2): 6, (1, 2): 6,
    }  # fmt: skip
    assert compile_route(whole(6, [0, 1], "partial"), whole(6, [0, 1], "partial")).links == {}
    assert compile_route(even(6, [0, 1]), whole(6, [0, 1], "partial")).links == {}
    spread = compile_route(whole(60, [0, 1, 2]), whole(60, [3, 4], "partial"))
    assert [leg[:3:2] + leg[4:] for leg in spread.legs] == [(0, 3, 20), (1, 3, 10), (1, 4, 10), (2, 4, 20)]
    near = compile_route(even(60, [0]), whole(60, [1, 2, 3], "partial"), node)
    assert near.links == {(0, 1): 60}
    assert compile_route(whole(60, [0, 4], "partial"), whole(60, [1, 5, 7], "partial"), node).links == {
        (0, 1): 60, (4, 5): 60,
    }  # fmt: skip


def test_all_of_a_group_send_and_take_evenly_much() -> None:
    """Replicas that only lie on ranks without what is wanted differ by one row at most."""
    for seed in range(300):
        choose = random.Random(seed)
        held = choose.choice(ORDERS)(37, 2, choose)
        groups = End({rank: tuple(held[rank // 3]) for rank in range(6)}, "replicated")
        route = compile_route(groups, random_end(37, range(6, 9), choose))
        for way in (route, transpose(route)):
            sent = Counter[int]()
            for (source, to), rows in way.links.items():
                sent[source if way is route else to] += rows
            for ranks in (range(3), range(3, 6)):
                loads = [sent[rank] for rank in ranks]
                assert max(loads) <= min(loads) + 1


def test_three_encoders_into_one_order_of_tokens() -> None:
    """Each decoder rank's rows come from three routes, whose rows interleave, each row from one."""
    for seed in range(50):
        choose, rows = random.Random(seed), 60
        kinds = [choose.randrange(3) for _ in range(rows)]
        tokens_of = [[row for row, kind in enumerate(kinds) if kind == i] for i in range(3)]
        decoder = choose.choice([zigzag, samples])(rows, 4, choose)
        order = {
            rank: [row for run in runs for row in range(run.start, run.stop)]
            for rank, runs in enumerate(decoder)
        }
        got = {rank: np.full(sum(run.length for run in runs), -1) for rank, runs in enumerate(decoder)}
        for own, ranks in zip(tokens_of, ([0, 1, 2], [2, 3], [5]), strict=True):
            number = {row: i for i, row in enumerate(own)}  # rows of an encoder are counted on their own
            source = even(len(own), ranks)
            want = {
                rank: tuple(Run(number[row], 1) for row in mine if row in number)
                for rank, mine in order.items()
            }
            route = compile_route(source, End(want))
            check_route(route, source, End(want))
            x = {rank: np.array(own)[tokens(source.holdings[rank]), None] for rank in ranks}
            for rank, came in carried(route, x).items():
                places = [place for place, row in enumerate(order[rank]) if row in number]
                assert (got[rank][places] == -1).all()
                got[rank][places] = came[:, 0]
        assert all((got[rank] == order[rank]).all() for rank in got)


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
    with pytest.raises(ValueError, match="4 rows travel although 0 would do"):
        check_route(needless, source, target)


def test_rows_count() -> None:
    route, source, target = compiled(8)
    assert route.sources == {rank: count(rows) for rank, rows in source.holdings.items()}
    assert route.targets == {rank: count(rows) for rank, rows in target.holdings.items()}
