"""Packing: every document once an epoch, none cut, windows full; the same for any reader and after stops."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import VISION, chat, image, index, picture, png, write
from media_files import settings as data_settings

from weft.config.errors import DataError
from weft.data.batch import join
from weft.data.packed import PackedLoader
from weft.data.packing import pack, shuffled


def ragged(count, most, seed=0):
    """Log-normal lengths up to ``most``."""
    draws = np.random.default_rng(seed).lognormal(np.log(most / 8), 1.0, count)
    return np.clip(draws, 1, most).astype(np.int32)


@settings(max_examples=80)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 12), st.integers(0, 5))
def test_windows_have_every_document_once(lengths, lookahead, seed):
    sizes = np.array(lengths, np.int32)
    order = shuffled(len(sizes), seed, "key", 0)
    windows = pack(sizes, order, 40, lookahead)
    found = [windows.window(i) for i in range(len(windows))]
    assert sorted(sum(found, [])) == list(range(len(lengths)))
    assert all(0 < sum(lengths[d] for d in window) <= 40 for window in found)
    assert sum(found, []) == order.tolist() or lookahead > 1


def slow_pack(lengths, order, most, lookahead):
    """The rule, word by word."""
    left, waiting, windows = list(order), [], []
    while left or waiting:
        window = []
        while True:
            while left and len(waiting) < lookahead:
                waiting.append(left.pop(0))
            room = most - sum(lengths[d] for d in window)
            fit = [d for d in waiting if lengths[d] <= room]
            if not fit:
                break
            taken = max(fit, key=lambda d: lengths[d]) if window else waiting[0]
            waiting.remove(taken)
            window.append(taken)
        windows.append(window)
    return windows


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 9))
def test_packing_follows_its_rule(lengths, lookahead):
    order = np.arange(len(lengths))[::-1].astype(np.int64)
    windows = pack(np.array(lengths, np.int32), order, 30, lookahead)
    assert [windows.window(i) for i in range(len(windows))] == slow_pack(
        lengths, order.tolist(), 30, lookahead
    )


@pytest.mark.parametrize("most", [512, 4096])
def test_windows_are_full(most):
    lengths = ragged(5000, most)
    windows = pack(lengths, shuffled(len(lengths), 0, "", 0), most, 256)
    assert lengths.sum() / (len(windows) * most) >= 0.98
    in_order = pack(lengths, np.arange(len(lengths)), most)
    assert len(in_order) > len(windows)


def test_a_document_longer_than_a_window_is_refused():
    with pytest.raises(DataError, match="a sample has 9 tokens, but sequences have 8"):
        pack(np.array([3, 9], np.int32), np.arange(2), 8)


def test_the_order_is_stable():
    """The same on every machine and with every version of numpy."""
    assert shuffled(8, 1234, "key", 0).tolist() == [1, 4, 6, 0, 5, 7, 3, 2]
    assert shuffled(8, 1234, "key", 1).tolist() != shuffled(8, 1234, "key", 0).tolist()
    assert shuffled(0, 0, "", 0).tolist() == []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty conversations of ragged lengths; some have one picture, some two."""
    folder = tmp_path_factory.mktemp("packing")
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(picture(seed=i)))
    random = np.random.default_rng(1)
    rows = []
    for i in range(60):
        media = [image(f"{random.integers(6)}.png") for _ in range(i % 3)]
        rows.append(chat(*media, "?" * int(random.integers(1, 40)), answer=str(i)))
    return index(data_settings(write(folder, rows), seq_length=96), folder / "cache")


def slow_document(split, number, depths):
    """Tokens, future, mask and places of a document, token by token."""
    source = split.sources[0]
    stored, counted = (array.tolist() for array in source.stored(number))
    tokens = [split.start_token, *stored][:-1]
    future = [
        [stored[i + d] if i + d < len(stored) else -1 for i in range(len(stored))] for d in range(depths + 1)
    ]
    mask = [[i + d < len(stored) and counted[i + d] for i in range(len(stored))] for d in range(depths + 1)]
    places, at = [], 0
    while at < len(tokens):
        if tokens[at] == VISION.token:
            places.append((at, 4))
            at += 4
        else:
            at += 1
    return tokens, future, mask, places


@pytest.mark.parametrize("depths", [0, 2])
def test_batches_equal_a_slow_reading(data, depths):
    split = data.splits["train"]
    loader = PackedLoader(split, 96, depths, 5, 16)
    plan = loader.plan(0)
    batch = loader.microbatch(2, 3)
    documents = [d for window in (2, 3, 4) for d in plan.window(window)]
    slow = [slow_document(split, d, depths) for d in documents]
    assert batch.tokens.tolist() == sum((s[0] for s in slow), [])
    assert batch.future.tolist() == [sum((s[1][k] for s in slow), []) for k in range(depths + 1)]
    assert batch.mask.tolist() == [sum((s[2][k] for s in slow), []) for k in range(depths + 1)]
    assert batch.lengths == tuple(len(s[0]) for s in slow)
    assert batch.samples == (2, 3, 4)
    assert batch.windows == tuple(sum(split.lengths[d] for d in plan.window(w)) for w in (2, 3, 4))
    starts = np.cumsum([0, *batch.lengths])
    want = [(int(start) + at, n) for start, s in zip(starts, slow, strict=False) for at, n in s[3]]
    assert [tuple(run) for placed in batch.items for run in placed.places] == want
    assert [p.item for p in batch.items] == [f.item for d in documents for f in split.items(d)]


def test_an_epoch_has_every_document_once(data):
    split = data.splits["train"]
    loader = PackedLoader(split, 96, 0, 5, 16)
    first = 0
    for epoch in range(3):
        count = len(loader.plan(epoch))
        batch = loader.microbatch(first, count)
        assert batch.targets == (split.targets,)
        assert sorted(batch.lengths) == sorted(split.lengths)
        assert max(batch.windows) <= 96
        first += count
    assert split.tokens / 96 / len(loader.plan(0)) > 0.9
    assert loader.plan(0).documents.tolist() != loader.plan(1).documents.tolist()


def equal(a, b):
    assert a.tokens.tolist() == b.tokens.tolist()
    assert (a.mask == b.mask).all()
    assert (a.lengths, a.samples, a.windows, a.items) == (b.lengths, b.samples, b.windows, b.items)


def test_any_share_of_readers_reads_the_same(data):
    split = data.splits["train"]
    loader = PackedLoader(split, 96, 1, 5)
    whole = loader.microbatch(10, 12)
    equal(whole, join([PackedLoader(split, 96, 1, 5).microbatch(10 + 4 * i, 4) for i in range(3)]))
    assert not len(loader.microbatch(7, 0).tokens)


@pytest.mark.parametrize("stop", [0, 3, 40, 90])
def test_a_resumed_loader_goes_on(data, stop):
    split = data.splits["train"]
    loader = PackedLoader(split, 96, 1, 5)
    state = json.loads(json.dumps(loader.state(stop)))
    again = PackedLoader(split, 96, 1, 5, state=state)
    assert again.changes == []
    equal(loader.microbatch(stop, 30), again.microbatch(stop, 30))
    assert again.state(stop + 30) == loader.state(stop + 30)
    with pytest.raises(ValueError, match="lies before"):
        PackedLoader(split, 96, 1, 5, state=loader.state(90)).microbatch(0, 1)


def test_changed_data_goes_on_in_the_next_epoch(data):
    split = data.splits["train"]
    state = PackedLoader(split, 96, 1, 5).state(40)
    other = PackedLoader(split, 128, 1, 5, state=state)
    assert "goes on in epoch" in other.changes[0]
    assert other.microbatch(40, 1).samples == (40,)
    text = PackedLoader(split, 96, 1, 5, state={"version": 1, "samples": 7, "sources": {}})
    assert "starts at its beginning" in text.changes[0]
    assert text.microbatch(7, 1).samples == (7,)


def test_evaluation_reads_every_document_once_in_order(data):
    split = data.splits["train"]
    whole = list(split.windows(96, 1, 4))
    assert sum(b.targets[0] for b in whole) == split.targets
    assert [n for b in whole for n in b.lengths] == split.lengths.tolist()
    assert [n for b in whole for n in b.samples] == list(range(sum(len(b.samples) for b in whole)))
    for parts in (2, 3, 5):
        shares = [list(split.windows(96, 1, 4, part=p, parts=parts)) for p in range(parts)]
        assert {len(s) for s in shares} == {len(whole)}
        for batch, own in zip(whole, zip(*shares, strict=True), strict=True):
            equal(batch, join(own))
    some = list(split.windows(96, 1, 4, limit=6))
    assert sum(len(b.samples) for b in some) == 6


def test_shuffled_items_are_those_of_other_samples(data):
    split = data.splits["train"]
    twin = split.shuffled(3)
    assert twin.shuffled(3) == twin.shuffled(3)
    plain, swapped = ([found for d in range(s.documents) for found in s.items(d)] for s in (split, twin))
    assert [f.start for f in plain] == [f.start for f in swapped]
    assert sorted(f.item for f in plain) == sorted(f.item for f in swapped)
    assert all(a.item is not b.item for a, b in zip(plain, swapped, strict=True))
    assert sum(a.item.ref == b.item.ref for a, b in zip(plain, swapped, strict=True)) == 0
    batch = next(iter(twin.windows(96, 0, 1)))
    assert batch.tokens.tolist() == next(iter(split.windows(96, 0, 1))).tokens.tolist()
