"""Balance and routes of token runs against rows counted one by one; the chooser against its rule."""

import random
from itertools import product

import pytest

from weft.plan.context import (
    AttendShape,
    ScanShape,
    attend_refusal,
    attend_traffic,
    choose_attend,
    choose_scan,
    even,
    scan_traffic,
)
from weft.plan.runs import (
    Run,
    arranged,
    balanced,
    common,
    contiguous,
    count,
    pieces,
    route,
    rows,
    seen,
    work,
)


def tokens_of(holding):
    return [token for run in holding for token in range(run.start, run.stop)]


def document_of(lengths):
    return [document for document, length in enumerate(lengths) for _ in range(length)]


def packs():
    rng = random.Random(0)
    yield from [(), (0,), (1,), (0, 3, 0), (64,), (65,), (512,) * 9, (1,) * 40]
    for _ in range(15):
        yield tuple(min(3000, int(20 * rng.paretovariate(0.8))) for _ in range(rng.randint(1, 60)))
        yield tuple(rng.randint(0, 4) for _ in range(rng.randint(1, 30)))
        long = [rng.randint(300, 900) for _ in range(rng.randint(1, 4))]
        short = [rng.randint(1, 30) for _ in range(rng.randint(0, 80))]
        yield tuple(rng.sample(long + short, len(long) + len(short)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_balance(ranks):
    """Every token once; work within the promise; tokens within half of the mean where there are enough."""
    for lengths in packs():
        shares = balanced(lengths, ranks)
        assert sorted(token for holding in shares for token in tokens_of(holding)) == list(
            range(sum(lengths))
        )
        assert all(list(holding) == sorted(holding) for holding in shares)
        loads = [work(lengths, holding) for holding in shares]
        mean, longest = sum(loads) / ranks, max(lengths, default=0)
        assert sum(loads) == sum(length * (length + 1) // 2 for length in lengths)
        assert max(loads) <= mean + max(mean / 20, longest + 1)
        if longest + 1 <= mean / 10:
            assert max(loads) <= 1.10 * mean
            assert max(map(count, shares)) <= 1.5 * sum(lengths) / ranks
        assert balanced(lengths, ranks) == shares


def test_long_documents_in_zigzag_short_ones_whole():
    assert balanced((64,), 4) == tuple((Run(8 * r, 8), Run(56 - 8 * r, 8)) for r in range(3)) + (
        (Run(24, 16),),
    )
    shares = balanced((800, 10, 10, 10, 10), 4)
    assert all(len(holding) <= 3 for holding in shares)
    assert sorted(run for holding in shares for run in holding if run.length == 10)
    assert balanced((100,) * 8, 4) == tuple((Run(100 * r, 100), Run(100 * r + 400, 100)) for r in range(4))


def test_work_counts_keys():
    lengths = (5, 0, 7)
    where = document_of(lengths)
    holding = (Run(1, 2), Run(4, 5))
    keys = sum(where[: token + 1].count(where[token]) for token in tokens_of(holding))
    assert work(lengths, holding) == keys


def test_balanced_cuts_are_left_alone():
    """Also where documents are cut; otherwise ranks keep what they can of what they have."""
    lengths = (100,) * 41
    counts = even(sum(lengths), 4)
    assert arranged(lengths, counts) == contiguous(counts)
    there = arranged((800,), even(800, 4))
    kept = [count(route(contiguous(even(800, 4)), there, rank).send[rank]) for rank in range(4)]
    assert kept == [100] * 4  # each has one of its two chunks
    assert sorted(there) == sorted(balanced((800,), 4))


@pytest.mark.parametrize("counts", [(40,), (13, 27), (0, 40, 0), (9, 1, 0, 30)])
def test_routes(counts):
    """Both ends agree, and every row of the destination is written once, with its own token."""
    lengths = (3, 30, 1, 6)
    here, there = contiguous(counts), balanced(lengths, len(counts))
    ways = [route(here, there, rank) for rank in range(len(counts))]
    for to, way in enumerate(ways):
        written = {}
        for source, runs in enumerate(way.receive):
            sent = [tokens_of(here[source])[row] for row in tokens_of(ways[source].send[to])]
            written |= dict(zip(tokens_of(runs), sent, strict=True))
        assert count(run for runs in way.receive for run in runs) == len(written)
        assert [written[row] for row in range(len(written))] == tokens_of(there[to])


def test_pieces_and_what_is_seen():
    """Against every pair of rows: each seen once, no other; keys that no query sees are left out."""
    rng = random.Random(1)
    for _ in range(30):
        lengths = tuple(rng.randint(0, 12) for _ in range(6))
        where = document_of(lengths)
        queries, keys = (arranged(lengths, even(sum(lengths), 3))[rng.randrange(3)] for _ in range(2))
        want = {
            (i, j)
            for (i, q), (j, k) in product(enumerate(tokens_of(queries)), enumerate(tokens_of(keys)))
            if where[q] == where[k] and k <= q
        }
        blocks = pieces(lengths, queries, keys)
        assert all(piece.diagonal >= 0 for piece in blocks)
        got = [
            (piece.queries.start + i, piece.keys.start + j)
            for piece in blocks
            for i in range(piece.queries.length)
            for j in range(min(piece.keys.length, i + piece.diagonal + 1))
        ]
        assert sorted(got) == sorted(want)
        assert sorted({j for _, j in want}) == tokens_of(rows(keys, seen(lengths, queries)))


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_intersections_and_bytes_token_by_token(ranks):
    """What is common, seen and sent, against sets of tokens."""
    rng = random.Random(ranks)
    for _ in range(15):
        lengths = (99, *(min(200, int(4 * rng.paretovariate(0.8))) for _ in range(rng.randint(1, 25))))
        where, counts = document_of(lengths), even(sum(lengths), ranks)
        here, there = contiguous(counts), arranged(lengths, counts)
        sees = []
        for own in there:
            last = {where[token]: token for token in tokens_of(own)}
            sees.append({token for token, document in enumerate(where) if token <= last.get(document, -1)})
            assert tokens_of(seen(lengths, own)) == sorted(sees[-1])
            for other in here:
                both = sorted({*tokens_of(own)} & {*tokens_of(other)})
                assert tokens_of(common(own, other)) == both
                assert tokens_of(rows(own, other)) == [tokens_of(own).index(token) for token in both]
        shape = AttendShape(
            lengths, counts, heads=1, kv_heads=1, head_dim=1
        )  # 4 bytes of a key and its value
        for form, holders, extra in (("all_gather", here, 0), ("ring", there, 4)):
            for rank, traffic in enumerate(attend_traffic(form, shape)):
                held = {*tokens_of(holders[rank])}
                get = len(sees[rank] - held)
                give = sum(len(held & other) for other in sees) - len(held & sees[rank])
                moved = counts[rank] - len({*tokens_of(here[rank])} & {*tokens_of(there[rank])})
                came = moved + count(there[rank]) - counts[rank]
                assert traffic.forward == came * (2 + extra) + 4 * get + 2 * moved
                assert traffic.backward == 2 * came + 4 * get + 8 * give + moved * (2 + extra)


def test_bytes_by_hand():
    """Four equal parts of one document: rows counted on paper."""
    shape = AttendShape((64,), (16,) * 4, heads=8, kv_heads=2, head_dim=4, itemsize=2)
    q, kv = 8 * 4 * 2, 2 * 2 * 4 * 2
    # Chunks of 8: each rank has 2, keeps 1, and the keys of the ranks before and after its chunks.
    ring = attend_traffic("ring", shape)
    assert sorted(rank.forward for rank in ring) == [8 * (2 * q + kv) + 8 * n * kv for n in (3, 4, 5, 6)]
    gather = attend_traffic("all_gather", shape)
    # The keys before the last chunk of each rank, less those of them that lie there already.
    assert sorted(rank.forward for rank in gather) == [8 * 2 * q + 8 * n * kv for n in (3, 4, 5, 6)]
    assert sum(rank.backward - rank.forward for rank in gather) == 8 * 18 * 2 * kv  # summed in fp32
    swap = 48 * (q // 4 + kv // 2) + 48 * q // 4
    assert {rank.forward for rank in attend_traffic("all_to_all", shape)} == {swap}
    scan = ScanShape((64,), (16,) * 4, heads=8, head_dim=4, groups=2, state=16, taps=4)
    channels = 8 * 4 + 2 * 2 * 16
    assert scan_traffic("states", scan)[0].forward == 3 * 4 * (8 + 8 * 4 * 16 + 3 * (2 * channels + 8))
    given, y = 2 * (8 + 2 * 16) + 4 * 2, 2 * 8
    assert scan_traffic("all_to_all", scan)[0].forward == 48 * given + 48 * y


def test_nothing_moves_within_documents():
    shape = AttendShape((8, 0, 8), (8, 0, 8), 6, 3, 4)
    assert all(rank.total == 0 for rank in attend_traffic("ring", shape))
    assert choose_attend(shape).form == "all_gather"  # fewest collectives of equal forms


def test_choice():
    """The fewest bytes over all ranks, of what is possible and not too large."""
    for tokens, ranks, heads, kv_heads in product((4096, 2**22), (2, 4), (32, 12), (1, 8)):
        shape = AttendShape((tokens,), even(tokens, ranks), heads, kv_heads, 128)
        choice = choose_attend(shape)
        possible = [f for f in ("ring", "all_gather", "all_to_all") if f not in choice.refused]
        totals = {form: sum(rank.total for rank in attend_traffic(form, shape)) for form in possible}
        assert choice.bytes == totals
        assert totals[choice.form] == min(totals.values())
    few = AttendShape((4096,), even(4096, 4), 32, 2, 128)
    assert choose_attend(few).form == "all_gather"
    limited = choose_attend(few, limit=2**20)
    assert limited.form == "ring"
    assert "more than the limit of 1048576" in limited.refused["all_gather"]
    assert choose_attend(AttendShape((4096,), even(4096, 4), 32, 32, 128)).form == "all_to_all"


def test_refusals_name_numbers_and_fix():
    assert "4 cp ranks" in attend_refusal("all_to_all", 6, 2, 4)
    assert "choose a cp that divides 6, or ring" in attend_refusal("all_to_all", 6, 2, 4)
    assert "cp 3 and 2 kv heads" in attend_refusal("all_to_all", 6, 2, 3)
    assert attend_refusal("ring", 6, 2, 4) == ""
    shape = ScanShape((64,), (16,) * 4, heads=6, head_dim=4, groups=2, state=16, taps=4)
    assert "choose a cp that divides 6, or states" in choose_scan(shape).refused["all_to_all"]
    assert choose_scan(shape).form == "states"
    with pytest.raises(ValueError, match="there are 6"):
        scan_traffic("all_to_all", shape)
