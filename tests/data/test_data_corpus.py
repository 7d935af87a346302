"""Building: every byte once, the cache whole or absent, baselines by hand, and refusals before any step."""

import errno
import json
import lzma
import math
import multiprocessing
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from weft.config.errors import DataError
from weft.data import parts
from weft.data.corpus import build_corpus
from weft.data.indexed import TokenWriter, open_tokens
from weft.data.inspect import describe
from weft.data.order import Loader
from weft.data.preflight import check_sources
from weft.data.tokenizer import train_tokenizer
from weft.spec.data import DataConfig, TokenizerConfig

TEXTS = {f"f{i:02}.py": f"# file {i}\n" + f"value_{i} = {i * i}\n" * (i % 5 + 1) + "é🙂" for i in range(40)}
SMALL = TokenizerConfig(vocab_size=300)


@pytest.fixture
def corpus_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def config(corpus_folder):
    return DataConfig(source=str(corpus_folder), valid_fraction=0.25, tokenizer=SMALL)


def texts_of(corpus, split):
    stream = corpus.splits[split].streams[0]
    return [corpus.tokenizer.decode(stream.document(d)) for d in range(stream.documents)]


def test_every_document_is_in_one_split_and_ends_with_eos(config, tmp_path):
    corpus = build_corpus(config, 300, tmp_path / "cache")
    train, valid = texts_of(corpus, "train"), texts_of(corpus, "valid")
    assert sorted(train + valid) == sorted(TEXTS.values())
    assert 3 <= len(valid) <= 17
    for split in corpus.splits.values():
        stream = split.streams[0]
        ends = [int(stream.document(d)[-1]) for d in range(stream.documents)]
        assert set(ends) == {corpus.tokenizer.eos_id}
        assert split.bytes == sum(len(t.encode()) for t in texts_of(corpus, split.name))
        assert stream.longest == max(len(stream.document(d)) for d in range(stream.documents))


def test_the_split_of_a_document_does_not_depend_on_where_it_lies(config, corpus_folder, tmp_path):
    first = texts_of(build_corpus(config, 300, tmp_path / "cache"), "valid")
    moved = corpus_folder.rename(tmp_path / "elsewhere")
    (moved / "f03.py").unlink()
    second = build_corpus(
        DataConfig(source=str(moved), valid_fraction=0.25, tokenizer=SMALL), 300, tmp_path / "c2"
    )
    assert texts_of(second, "valid") == [t for t in first if t != TEXTS["f03.py"]]


def test_the_key_of_a_source_is_its_content(config, corpus_folder, tmp_path):
    keys = [build_corpus(config, 300, tmp_path / "cache").splits["train"].streams[0].key]
    moved = DataConfig(source=str(corpus_folder.rename(tmp_path / "b")), valid_fraction=0.25, tokenizer=SMALL)
    keys.append(build_corpus(moved, 300, tmp_path / "cache").splits["train"].streams[0].key)
    assert keys[0] == keys[1]


def test_baselines_by_hand(config, tmp_path):
    corpus = build_corpus(config, 300, tmp_path / "cache")
    valid, raw = corpus.splits["valid"], "".join(texts_of(corpus, "valid")).encode()
    assert valid.bytes == len(raw)
    assert valid.baselines["zlib"] == 8 * len(zlib.compress(raw, 9)) / len(raw)
    assert valid.baselines["lzma"] == 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
    counts = Counter(corpus.splits["train"].streams[0].data.tolist())
    total = sum(counts.values()) + corpus.tokenizer.vocab_size
    targets = [t for batch in valid.windows(16, 0, 3) for t in batch.future[0].tolist()]
    bits = -sum(math.log2((counts[t] + 1) / total) for t in targets)
    assert valid.baselines["unigram"] == pytest.approx(bits / len(raw), rel=1e-12)
    assert corpus.splits["train"].baselines == {}


def test_the_second_build_reads_nothing(config, corpus_folder, tmp_path, monkeypatch):
    lines = []
    first = build_corpus(config, 300, tmp_path / "cache", lines.append)
    assert [line.split()[0] for line in lines] == ["training", "tokenizing"]
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"read {self}"))
    second = build_corpus(config, 300, tmp_path / "cache", pytest.fail)
    assert second.splits["valid"].baselines == first.splits["valid"].baselines
    one, two = (c.splits["train"] for c in (first, second))
    assert np.array_equal(one.streams[0].data, two.streams[0].data)


def test_a_changed_file_is_tokenized_again(config, corpus_folder, tmp_path):
    build_corpus(config, 300, tmp_path / "cache")
    (corpus_folder / "f00.py").write_text("changed entirely")
    corpus = build_corpus(config, 300, tmp_path / "cache")
    assert "changed entirely" in texts_of(corpus, "train") + texts_of(corpus, "valid")


def test_a_crash_leaves_nothing_that_is_read(config, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(parts, "scan", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_corpus(config, 300, cache)
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["tokenizer"]
    assert build_corpus(config, 300, cache).splits["train"].documents > 0


def test_a_full_disk_is_told(config, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("weft.data.cache.os.fsync", full)
    with pytest.raises(
        DataError, match=r"cannot write the token cache \(No space left on device\); set data\.cache"
    ):
        build_corpus(config, 300, tmp_path / "cache")


def _build(source: str, cache: str) -> str:
    config = DataConfig(source=source, valid_fraction=0.25, tokenizer=SMALL)
    return build_corpus(config, 300, Path(cache)).splits["train"].streams[0].key


def test_processes_may_build_at_once(corpus_folder, tmp_path):
    cache = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        keys = pool.starmap(_build, [(str(corpus_folder), str(cache))] * 3)
    assert len(set(keys)) == 1
    assert not list(cache.glob("*.partial"))


def test_one_text_file_holds_out_its_last_lines(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig(source=str(tmp_path / "book.txt"), valid_fraction=0.1, tokenizer=SMALL)
    corpus = build_corpus(config, 300, tmp_path / "cache")
    train, valid = texts_of(corpus, "train")[0], texts_of(corpus, "valid")[0]
    assert train + valid == text
    assert train.endswith("\n")
    assert 0.09 < len(valid) / len(text) < 0.12


def test_long_documents_are_tokenized_in_pieces_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_PIECE", 50)
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 130
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(source=str(tmp_path / "a.txt"), valid_fraction=0, tokenizer=SMALL)
    corpus = build_corpus(config, 300, tmp_path / "cache")
    assert texts_of(corpus, "train") == [text]
    assert list(corpus.splits) == ["train"]


def test_left_out_documents_are_counted(tmp_path):
    rows = [{"text": "good\n" * 9}, {"text": ""}, {"text": "\ud800"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {"source": str(tmp_path / "a.jsonl"), "valid_fraction": 0, "tokenizer": SMALL}
    with pytest.raises(DataError, match=r"a\.jsonl:3 holds half of a surrogate pair at character 0"):
        build_corpus(DataConfig(**settings), 300, tmp_path / "cache")
    corpus = build_corpus(DataConfig(**settings, encoding_errors="skip"), 300, tmp_path / "cache")
    assert corpus.splits["train"].streams[0].skipped == {"empty": 1, "not UTF-8": 1}
    assert "1 left out (not UTF-8)" in describe(corpus, 16, 0)


def test_max_documents(config, corpus_folder, tmp_path):
    limited = DataConfig(source=str(corpus_folder), valid_fraction=0, max_documents=5, tokenizer=SMALL)
    assert build_corpus(limited, 300, tmp_path / "cache").splits["train"].documents == 5


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_corpus_is_refused(tmp_path, content):
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_text(content)
    config = DataConfig(source=str(folder), valid_fraction=0, tokenizer=SMALL)
    with pytest.raises(DataError, match="empty corpus|corpus is empty"):
        build_corpus(config, 300, tmp_path / "cache")


def test_an_empty_validation_split_is_refused(corpus_folder, tmp_path):
    config = DataConfig(source=str(corpus_folder), valid_fraction=1e-9, tokenizer=SMALL)
    with pytest.raises(
        DataError, match=r"no document fell into the split 'valid'; raise data\.valid_fraction = 1e-09"
    ):
        build_corpus(config, 300, tmp_path / "cache")


def test_a_tokenizer_larger_than_the_model_is_refused(config, tmp_path):
    with pytest.raises(
        DataError, match="300 tokens, but the model's vocabulary has 299; raise model.vocab_size"
    ):
        build_corpus(config, 299, tmp_path / "cache")


# Blends and tokenized files


@pytest.fixture
def tokenizer_folder(tmp_path):
    train_tokenizer(TEXTS.values(), SMALL).save(tmp_path / "tok")
    return tmp_path / "tok"


def write_pair(prefix, documents):
    with TokenWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(document)


def blend_config(tmp_path, content, tokenizer_folder, **settings):
    (tmp_path / "blend.json").write_text(json.dumps(content))
    tokenizer = TokenizerConfig(path=str(tokenizer_folder))
    return DataConfig(blend=str(tmp_path / "blend.json"), tokenizer=tokenizer, **settings)


def test_a_blend_of_texts_and_tokens(tmp_path, corpus_folder, tokenizer_folder):
    tokenizer = build_corpus(
        DataConfig(source=str(corpus_folder), tokenizer=TokenizerConfig(path=str(tokenizer_folder))),
        300,
        tmp_path / "c",
    ).tokenizer
    eos = tokenizer.eos_id
    write_pair(tmp_path / "pair", [[*tokenizer.encode(f"text {i}"), eos] for i in range(9)])
    blend = {"train": [0.7, "texts", "0.3", "pair"], "valid": ["pair.bin", "texts"], "test": "texts/f01.py"}
    corpus = build_corpus(blend_config(tmp_path, blend, tokenizer_folder), 300, tmp_path / "c")
    train, valid, test = (corpus.splits[n] for n in ("train", "valid", "test"))
    assert [s.name for s in train.streams] == ["texts", "pair"]
    assert train.weights == (700_000_000, 300_000_000)
    assert train.bytes == 0  # the text of a tokenized training source is not known
    assert valid.bytes == sum(len(f"text {i}") for i in range(9)) + sum(
        len(t.encode()) for t in TEXTS.values()
    )
    assert set(valid.baselines) == set(test.baselines) == {"unigram", "zlib", "lzma"}
    assert texts_of(corpus, "valid")[3] == "text 3"
    assert texts_of(corpus, "test") == [TEXTS["f01.py"]]
    batch = Loader(train, 16, 1, 0).microbatch(0, 20)
    assert len(batch.tokens) == 320
    shown = describe(corpus, 16, 0)
    for words in ("70.00%  texts: 40 documents", "30.00%  pair: 9 documents", "to beat", "of train, tokens "):
        assert words in shown


def test_our_cache_is_a_megatron_pair(config, tmp_path):
    build_corpus(config, 300, tmp_path / "cache")
    (index,) = (tmp_path / "cache").glob("tokens-*/train.idx")
    assert open_tokens(index.with_suffix("")).documents > 0


def test_tokenized_files_hold_out_their_last_documents(tmp_path, tokenizer_folder):
    documents = [[5 + i, 7, 0] for i in range(10)]
    write_pair(tmp_path / "pair", documents)
    config = blend_config(tmp_path, {"train": "pair"}, tokenizer_folder, valid_fraction=0.2)
    corpus = build_corpus(config, 300, tmp_path / "c")
    streams = [corpus.splits[n].streams[0] for n in ("train", "valid")]
    assert [[s.document(d).tolist() for d in range(s.documents)] for s in streams] == [
        documents[:8],
        documents[8:],
    ]
    assert streams[0].tokens == 24


def test_a_start_token_in_the_file_is_read_but_not_predicted(tmp_path, tokenizer_folder):
    eos = 0  # also the start token of a trained tokenizer
    write_pair(tmp_path / "pair", [[eos, 5, 6], [eos, 7]])
    config = blend_config(tmp_path, {"train": "pair"}, tokenizer_folder, valid_fraction=0)
    split = build_corpus(config, 300, tmp_path / "c").splits["train"]
    (batch,) = split.windows(8, 0, 1)
    assert batch.tokens.tolist() == [0, 5, 0]
    assert batch.future.tolist() == [[5, 6, 7]]


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer_folder):
    write_pair(tmp_path / "pair", [[5, 400, 0]])
    config = blend_config(tmp_path, {"train": "pair"}, tokenizer_folder, valid_fraction=0)
    message = r"pair\.bin: holds token id 400, but the model's vocabulary has {} tokens"
    with pytest.raises(DataError, match=message.format(300)):
        build_corpus(config, 300, tmp_path / "c")
    build_corpus(config, 401, tmp_path / "c")
    with pytest.raises(DataError, match=message.format(400)):  # remembered from the scan before
        build_corpus(config, 400, tmp_path / "c")


def test_tokenized_files_need_their_tokenizer(tmp_path):
    write_pair(tmp_path / "pair", [[5, 0]])
    with pytest.raises(DataError, match=r"set data\.tokenizer\.path"):
        build_corpus(DataConfig(source=str(tmp_path / "pair")), 300, tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"blend\.json: not JSON"),
        ("[]", "must be an object with at least 'train'"),
        ('{"valid": ["a"]}', "must be an object with at least 'train'"),
        ('{"train": ["a"], "vaild": ["b"]}', "unknown split 'vaild'.* did you mean 'valid'"),
        ('{"train": 5}', "'train' must be a list of paths"),
        ('{"train": [1, "a", "b"]}', r"'train' has 1 where a path must stand \(path 1\)"),
        ('{"train": ["a", 1]}', r"'train' has 1 where a path must stand \(path 2\)"),
        ('{"train": [0, "a"]}', "gives a the weight 0.0; it must be more than 0"),
        ('{"train": [1, "a", NaN, "b"]}', "gives b the weight nan"),
    ],
)
def test_a_bad_blend_is_explained(tmp_path, content, message):
    (tmp_path / "blend.json").write_text(content)
    with pytest.raises(DataError, match=message):
        build_corpus(DataConfig(blend=str(tmp_path / "blend.json")), 300, tmp_path / "c")


def test_preflight_finds_everything_at_once(tmp_path):
    (tmp_path / "cut.idx").write_bytes(b"MMIDIDX")
    (tmp_path / "cut.bin").touch()
    content = {"train": ["gone.txt", "cut", "stdlib"], "valid": ["gone.txt", "hf:x:y:z:w"]}
    config = blend_config(tmp_path, content, tmp_path / "no-tokenizer")
    problems = list(check_sources(config, 300))
    assert [p.path for p in problems] == ["tokenizer.path", "blend", "blend", "blend"]
    words = ["does not exist", "gone.txt: no such file", "cut.idx: 7 bytes", "write hf:NAME"]
    for problem, expected in zip(problems, words, strict=True):
        assert expected in problem.message


def test_preflight_of_the_defaults_finds_nothing(tmp_path, tokenizer_folder):
    assert list(check_sources(DataConfig(), 4096)) == []
    assert list(check_sources(DataConfig(source="mock"), 64)) == []
    large = DataConfig(tokenizer=TokenizerConfig(path=str(tokenizer_folder)))
    (problem,) = check_sources(large, 299)
    assert "300 tokens, but the model's vocabulary has 299" in problem.message
    (problem,) = check_sources(DataConfig(blend="gone.json"), 64)
    assert (problem.path, problem.message) == ("blend", "data.blend: gone.json does not exist")


# Mock data and the default corpus


def test_mock_needs_no_files(tmp_path):
    corpus = build_corpus(DataConfig(source="mock", mock_tokens=5000), 64, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert corpus.tokenizer is None
    train, valid = corpus.splits["train"], corpus.splits["valid"]
    assert (train.tokens, valid.tokens, valid.bytes) == (4900, 100, 100)
    assert int(train.streams[0].data.max()) == 63
    again = build_corpus(DataConfig(source="mock", mock_tokens=5000), 64, tmp_path)
    assert np.array_equal(again.splits["train"].streams[0].data, train.streams[0].data)
    assert "4,900 tokens" in describe(corpus, 16, 0)


def test_mock_with_a_tokenizer_stays_in_its_vocabulary(tmp_path, tokenizer_folder):
    config = DataConfig(source="mock", tokenizer=TokenizerConfig(path=str(tokenizer_folder)))
    corpus = build_corpus(config, 5000, tmp_path)
    assert int(corpus.splits["train"].streams[0].data.max()) < 300


def test_the_default_corpus_in_small(tmp_path):
    config = DataConfig(max_documents=30, valid_fraction=0.2, tokenizer=SMALL)
    corpus = build_corpus(config, 300, tmp_path / "cache")
    assert corpus.splits["train"].documents + corpus.splits["valid"].documents <= 30
    assert corpus.splits["valid"].baselines["zlib"] < corpus.splits["valid"].baselines["unigram"] < 8
