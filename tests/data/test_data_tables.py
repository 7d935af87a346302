"""Parquet files and Hugging Face datasets, on disk and streamed from a local folder."""

import json

import pytest

from weft.config.errors import DataError
from weft.data.sources import Document, Skipped, open_source
from weft.spec.data import DataConfig

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def read(name, **settings):
    return list(open_source(str(name), DataConfig(**settings)).documents())


def test_parquet(tmp_path):
    pq.write_table(
        pa.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "t.parquet", row_group_size=1
    )
    expected = [Document("t.parquet:0", "a"), Skipped("t.parquet:1", "no text"), Document("t.parquet:2", "c")]
    assert read(tmp_path / "t.parquet") == expected == read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_field": "body"}, r"t\.parquet: no column 'body'; it has \['n', 'text'\]"),
        ({"text_field": "n"}, r"t\.parquet: column 'n' holds int, not text"),
    ],
)
def test_a_wrong_column_is_named(tmp_path, settings, message):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "t.parquet", **settings)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"t\.parquet: not a Parquet file that can be read"):
        read(tmp_path)


def test_a_dataset_on_disk(tmp_path, datasets):
    whole = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]})
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(tmp_path / "d"))
    assert [d.text for d in read(tmp_path / "d" / "train")] == ["a", "b"]
    with pytest.raises(
        DataError, match=r"holds the splits \['test', 'train'\]; name one, for example .*d/test"
    ):
        read(tmp_path / "d")
    with pytest.raises(DataError, match=r"no column 'body'; it has \['n', 'text'\]"):
        read(tmp_path / "d" / "train", text_field="body")
    prints = {open_source(str(tmp_path / "d" / s), DataConfig()).fingerprint() for s in ("train", "test")}
    assert len(prints) == 2


def test_a_stream(tmp_path, datasets):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "abc"))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "z"}))
    assert [d.text for d in read(f"hf:{tmp_path}")] == ["a", "b", "c"]
    assert [d.text for d in read(f"hf:{tmp_path}:test")] == ["z"]
    with pytest.raises(DataError, match=r"cannot be read \("):
        read(f"hf:{tmp_path / 'gone'}")


@pytest.mark.parametrize("name", ["hf:", "hf:a:b:c:d"])
def test_a_stream_is_written_as_told(name):
    with pytest.raises(DataError, match="write hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:CONFIG"):
        read(name)
