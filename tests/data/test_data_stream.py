"""Windows of a stream against a twin that writes out every document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data.batch import Batch, join
from weft.data.stream import Split, Stream, make_split

START = 99
documents_strategy = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=7)


def make_stream(documents: list[list[int]], lead: int = 0, key: str = "k") -> Stream:
    stored = [[START] * lead + d for d in documents]
    bounds = np.cumsum([0, *(len(d) for d in stored)]).tolist()
    data = np.array(sum(stored, []), np.uint16)
    return Stream(name=key, key=key, data=data, bounds=bounds, start_token=START, lead=lead, bytes=data.size)


def twin(documents: list[list[int]], place: int, length: int, depths: int) -> Batch:
    """The slow reading of the contract: one entry for each target of the ring of documents."""
    entries = []
    for document in documents:
        whole = [START, *document]
        for i in range(len(document)):
            ahead = [whole[i + k] if i + k < len(whole) else -1 for k in range(1, depths + 2)]
            entries.append((whole[i], ahead, i == 0))
    picked = [entries[(place + i) % len(entries)] for i in range(length)]
    lengths: list[int] = []
    for number, (_, _, begins) in enumerate(picked):
        if begins or number == 0:
            lengths.append(0)
        lengths[-1] += 1
    future = np.array([ahead for _, ahead, _ in picked], np.int64).T.copy()
    return Batch(np.array([p[0] for p in picked], np.int64), future, future >= 0, tuple(lengths), (0,))


def equal(one: Batch, two: Batch) -> bool:
    arrays = (np.array_equal(getattr(one, n), getattr(two, n)) for n in ("tokens", "future", "mask"))
    return all(arrays) and (one.lengths, one.samples) == (two.lengths, two.samples)


@given(documents_strategy, st.integers(0, 1), st.integers(0, 3), st.data())
def test_a_window_equals_its_twin(documents, lead, depths, data):
    stream = make_stream(documents, lead)
    assert stream.tokens == sum(map(len, documents))
    place = data.draw(st.integers(0, stream.tokens - 1))
    length = data.draw(st.integers(1, 3 * stream.tokens))
    assert equal(stream.window(place, length, depths), twin(documents, place, length, depths))


def test_a_window_by_hand():
    stream = make_stream([[1, 2, 3], [4, 5]])
    batch = stream.window(1, 4, depths=1)
    assert batch.tokens.tolist() == [1, 2, START, 4]
    assert batch.future.tolist() == [
        [2, 3, 4, 5],
        [3, -1, 5, -1],
    ]  # 3 lies in the window, -1 beyond the document
    assert batch.lengths == (2, 2)
    assert batch.targets == (4, 2)


def test_a_window_looks_beyond_its_end_but_not_beyond_the_document():
    batch = make_stream([[1, 2, 3], [4, 5]]).window(0, 2, depths=2)
    assert batch.future.tolist() == [[1, 2], [2, 3], [3, -1]]


@given(documents_strategy, documents_strategy, st.integers(2, 9), st.integers(1, 4), st.integers(1, 3))
def test_evaluation_meets_every_token_once(one, two, seq_length, count, parts):
    split = make_split("valid", [make_stream(one, key="a"), make_stream(two, 1, key="b")])
    batches = {}
    for part in range(parts):
        for turn, batch in enumerate(split.windows(seq_length, 1, count, part=part, parts=parts)):
            batches[turn * parts + part] = batch
    whole = join([batches[i] for i in range(len(batches))])
    assert whole.future[0].tolist() == sum(one, []) + sum(two, [])
    assert whole.mask[0].all()
    assert whole.samples == tuple(range(len(whole.samples)))
    assert sum(whole.lengths) == split.tokens == whole.targets[0]


def test_a_limited_evaluation_is_spread_over_the_split():
    split = make_split("valid", [make_stream([list(range(40))] * 10)])
    batches = list(split.windows(8, 0, 2, limit=10))
    assert [b.samples for b in batches] == [(0, 5), (10, 15), (20, 25), (30, 35), (40, 45)]
    assert len(list(split.windows(8, 0, 2, limit=1000))) == 25


def test_weights_become_integers_or_follow_tokens():
    streams = [make_stream([[1] * 30], key="a"), make_stream([[2] * 10], key="b")]
    assert make_split("train", streams, [1, 4]).weights == (200_000_000, 800_000_000)
    assert make_split("train", streams).weights == (750_000_000, 250_000_000)


def test_the_same_content_twice_has_two_keys():
    split = make_split("train", [make_stream([[1, 2]])] * 3)
    assert [s.key for s in split.streams] == ["k", "k#2", "k#3"]


def test_bytes_are_unknown_where_one_source_is():
    known, unknown = make_stream([[1, 2]]), Stream("u", "u", np.array([1], np.int32), [0, 1], START)
    assert Split("s", (known,), (1,)).bytes == 2
    assert Split("s", (known, unknown), (1, 1)).bytes == 0


@pytest.mark.parametrize("lead", [0, 1])
def test_stored_documents_come_back(lead):
    stream = make_stream([[1, 2], [3]], lead)
    assert stream.document(0).tolist() == [START] * lead + [1, 2]
