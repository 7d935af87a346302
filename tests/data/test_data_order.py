"""The order of samples: a bijection each epoch, pure, resumable, and true to the weights."""

import heapq
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_stream import documents_strategy, equal, make_stream

from weft.config.errors import DataError
from weft.data.batch import join
from weft.data.order import Loader, Schedule, permute
from weft.data.stream import make_split

weights_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(st.integers(1, 700), st.binary(min_size=1, max_size=32))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_works_on_huge_ranges():
    size = 10**15 + 7
    images = {permute(i, size, b"k") for i in range(200)}
    assert len(images) == 200
    assert 0.4 < np.mean(sorted(images)) / size < 0.6


def test_permute_is_spread_over_keys():
    firsts = Counter(permute(0, 6, bytes([a, b])) for a in range(60) for b in range(50))
    assert all(400 < firsts[i] < 600 for i in range(6))  # 500 each, sigma 20


def twin_schedule(weights: list[int], samples: int) -> list[int]:
    """Every sample in the order it falls due, from the beginning."""
    due = [(Fraction(1, w), s, 1) for s, w in enumerate(weights)]
    heapq.heapify(due)
    order = []
    for _ in range(samples):
        _, source, number = heapq.heappop(due)
        order.append(source)
        heapq.heappush(due, (Fraction(2 * number + 1, weights[source]), source, number + 1))
    return order


@given(weights_strategy, st.integers(0, 150))
def test_the_schedule_is_the_same_from_anywhere(weights, start):
    schedule, order = Schedule(tuple(weights)), twin_schedule(weights, start + 20)
    assert schedule.counts(start) == [order[:start].count(s) for s in range(len(weights))]
    walk = schedule.walk(start)
    for place in range(start, start + 20):
        assert next(walk) == (order[place], order[:place].count(order[place]))


@given(weights_strategy, st.integers(0, 10**12))
def test_no_source_is_far_from_its_share(weights, sample):
    counts = Schedule(tuple(weights)).counts(sample)
    assert sum(counts) == sample
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(sample * weight, sum(weights))) <= 1 + Fraction(len(weights), 2)


@settings(max_examples=60)
@given(documents_strategy, st.integers(2, 12), st.integers(0, 2), st.integers(0, 5))
def test_an_epoch_meets_every_token_once(documents, seq_length, depths, seed):
    stream = make_stream(documents)
    loader = Loader(make_split("train", [stream]), seq_length, depths, seed)
    windows = -(-stream.tokens // seq_length)
    for epoch in range(3):
        batch = loader.microbatch(epoch * windows, windows)
        assert len(batch.tokens) == windows * seq_length == sum(batch.lengths)
        seen = Counter(batch.future[0][batch.mask[0]].tolist())
        assert seen == Counter(sum(documents, []))
        assert batch.targets[0] == stream.tokens
        assert batch.targets[-1] == sum(max(0, len(d) - depths) for d in documents)


def test_epochs_and_seeds_differ():
    stream = make_stream([list(range(50)) for _ in range(40)])
    split = make_split("train", [stream])
    epochs = [Loader(split, 16, 0, 1).microbatch(e * 125, 125).tokens.tolist() for e in range(2)]
    assert epochs[0] != epochs[1]
    assert Loader(split, 16, 0, 2).microbatch(0, 125).tokens.tolist() != epochs[0]
    assert Loader(split, 16, 0, 1).microbatch(0, 125).tokens.tolist() == epochs[0]


def blend(names="ab", weights=(3.0, 1.0), size=20):
    streams = [make_stream([[ord(n)] * 7 + [i] for i in range(size)], key=n) for n in names]
    return make_split("train", streams, weights)


def test_the_first_samples_are_the_same_forever():
    """Frozen: a change of the order is a change of every run that resumes."""
    loader = Loader(blend(), 8, 1, seed=1234)
    batch = loader.microbatch(0, 4)
    assert batch.samples == (0, 1, 2, 3)
    assert [chr(max(batch.future[0][i : i + 8])) for i in range(0, 32, 8)] == list("aaba")
    assert [int(n) for n in batch.future[0] if n < 20] == [6, 8, 12, 15]


@given(st.integers(1, 4), st.integers(0, 40))
def test_shares_see_the_same_stream(power, step):
    shares, size = 2**power // 2, 8
    loader = Loader(blend(), 8, 1, 7)
    whole = loader.microbatch(step * size, size)
    each = size // shares
    parts = [Loader(blend(), 8, 1, 7).microbatch(step * size + r * each, each) for r in range(shares)]
    assert equal(join(parts), whole)


@given(st.integers(0, 60), st.integers(0, 60))
def test_resuming_equals_going_on(first, more):
    loader = Loader(blend(), 8, 1, 7)
    state = json.loads(json.dumps(loader.state(first)))
    again = Loader(blend(), 8, 1, 7, state)
    assert again.changes == []
    assert equal(again.microbatch(first + more, 3), loader.microbatch(first + more, 3))
    assert again.state(first + more) == loader.state(first + more)


def own_windows(loader: Loader, start: int, count: int, name: str) -> list[list[int]]:
    batch = loader.microbatch(start, count)
    rows = batch.tokens.reshape(count, -1), batch.future[0].reshape(count, -1)
    return [t.tolist() + f.tolist() for t, f in zip(*rows, strict=True) if ord(name) in f]


def test_sources_go_on_after_a_change_of_the_blend():
    uninterrupted = own_windows(Loader(blend("a", ()), 8, 1, 7), 0, 60, "a")
    one = Loader(blend("ab", (3.0, 1.0)), 8, 1, 7)
    two = Loader(blend("ac", (1.0, 1.0)), 8, 1, 7, one.state(20))
    three = Loader(blend("bac", (1.0, 1.0, 1.0)), 8, 1, 7, json.loads(json.dumps(two.state(33))))
    met = own_windows(one, 0, 20, "a") + own_windows(two, 20, 13, "a") + own_windows(three, 33, 30, "a")
    assert len(met) == 15 + 7 + 10  # the first of two equal sources is due first
    assert met == uninterrupted[: len(met)]
    b = own_windows(one, 0, 20, "b") + own_windows(three, 33, 30, "b")
    assert b == own_windows(Loader(blend("b", ()), 8, 1, 7), 0, len(b), "b")
    assert any("left the blend" in change for change in two.changes)
    assert any("c: new in the blend" in change for change in two.changes)
    assert any("b: goes on at its sample 5" in change for change in three.changes)


blends_strategy = st.tuples(st.permutations("abcd"), st.lists(st.integers(1, 9), min_size=1, max_size=4))


@settings(max_examples=50)
@given(st.lists(blends_strategy, min_size=1, max_size=6), st.data())
def test_any_history_of_blends_keeps_every_source_in_its_order(history, data):
    state, sample, met = None, 0, {name: [] for name in "abcd"}
    for names, weights in history:
        loader = Loader(blend(names[: len(weights)], weights), 8, 1, 7, state)
        count = data.draw(st.integers(1, 15))
        for name in met:
            met[name] += own_windows(loader, sample, count, name)
        sample += count
        state = json.loads(json.dumps(loader.state(sample)))
    for name, windows in met.items():
        alone = Loader(blend(name, ()), 8, 1, 7)
        assert not windows or windows == own_windows(alone, 0, len(windows), name)


def test_a_change_of_weights_alone_keeps_positions():
    one = Loader(blend("ab", (3.0, 1.0)), 8, 1, 7)
    two = Loader(blend("ab", (1.0, 3.0)), 8, 1, 7, one.state(20))
    state = two.state(40)
    assert {k: v["consumed"] for k, v in state["sources"].items()} == {"a": 15 + 5, "b": 5 + 15}
    again = Loader(blend("ab", (1.0, 3.0)), 8, 1, 7, json.loads(json.dumps(state)))
    assert equal(again.microbatch(40, 9), two.microbatch(40, 9))


def test_another_sequence_length_begins_the_next_epoch():
    one = Loader(blend("a", ()), 8, 1, 7)
    two = Loader(blend("a", ()), 16, 1, 7, one.state(25))  # 20 windows an epoch
    assert two.state(25)["sources"]["a"]["consumed"] == 2 * 10
    assert "goes on in epoch 2" in two.changes[0]
    batch = two.microbatch(25, 10)
    assert batch.targets[0] == two.blend.tokens


def test_samples_before_a_change_are_refused():
    two = Loader(blend("b", ()), 8, 1, 7, Loader(blend("a", ()), 8, 1, 7).state(20))
    with pytest.raises(ValueError, match="sample 19 lies before 20"):
        two.microbatch(19, 1)
    with pytest.raises(ValueError, match="sample 19 lies before 20"):
        two.state(19)


def test_a_position_of_another_version_is_refused():
    with pytest.raises(DataError, match="version 9"):
        Loader(blend(), 8, 1, 7, {"version": 9})
