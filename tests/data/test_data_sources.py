"""Sources: order, fingerprints, and one clear message for each kind of bad input."""

import builtins
import gzip
import importlib.util
import json
import os
import sysconfig
from pathlib import Path

import pytest

from weft.config.errors import DataError
from weft.data.sources import Document, FileSource, Skipped, open_source, stdlib_source, tokenized_prefix
from weft.data.tables import require
from weft.spec.data import DataConfig

CONFIG = DataConfig()


def read(name, config=CONFIG, base=None):
    return list(open_source(str(name), config, base).documents())


def test_a_folder_gives_its_files_in_order_without_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/c.md", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == [Document(n, n) for n in ("a/c.md", "a/z.txt", "b.txt")]
    assert read(tmp_path, DataConfig(glob="*.txt")) == [Document(n, n) for n in ("a/z.txt", "b.txt")]


def test_text_is_kept_to_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\r\nb\rc\n".encode())
    assert read(tmp_path / "a.txt")[0].text == "\ufeffa\r\nb\rc\n"


def test_jsonl_plain_and_compressed(tmp_path):
    lines = "\n".join([json.dumps({"text": "één", "n": 1}), "", json.dumps({"text": "two"})])
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(lines)
    assert read(tmp_path / "a.jsonl") == [Document("a.jsonl:1", "één"), Document("a.jsonl:3", "two")]
    assert [d.text for d in read(tmp_path)] == ["één", "two"] * 2


def test_relative_paths_are_also_looked_up_beside_the_blend(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert read("a.txt", base=tmp_path) == [Document("a.txt", "x")]


def test_the_standard_library_without_its_tests():
    source = stdlib_source(CONFIG)
    names = [p.relative_to(source.root).as_posix() for p in source.files]
    assert "ast.py" in names
    assert "json/decoder.py" in names
    assert not [
        n for n in names if {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(n.split("/"))
    ]
    assert names == sorted(names, key=lambda n: n.split("/"))
    assert source.root == Path(sysconfig.get_paths()["stdlib"])


def test_repeated_contents_are_left_out(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("same" if name != "b" else "other")
    source = FileSource("s", tmp_path, tuple(tmp_path / n for n in "abc"), CONFIG, distinct=True)
    assert list(source.documents())[2] == Skipped("c", "repeated content")


def test_fingerprints_follow_files_and_settings(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    first = open_source(str(tmp_path), CONFIG).fingerprint()
    assert first == open_source(str(tmp_path), CONFIG).fingerprint()
    assert first != open_source(str(tmp_path), DataConfig(text_field="body")).fingerprint()
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert first != open_source(str(tmp_path), CONFIG).fingerprint()


def test_a_cut_archive_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "x"}\n' * 50)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read \(Compressed file ended"):
        read(tmp_path)


def test_a_missing_path_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file, folder or \.bin/\.idx prefix") as caught:
        read("nowhere", base=tmp_path)
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert str(Path.cwd() / "nowhere") in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file in .* matches data\.glob='\*\.c'"):
        read(tmp_path, DataConfig(glob="*.c"))


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 3 \(0xff\)"):
        read(tmp_path)
    assert read(tmp_path, DataConfig(encoding_errors="skip")) == [Skipped("bad.txt", "not UTF-8")]


def test_a_bad_line_counts_its_bytes_from_the_start_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9"}\n{"text": "y"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: not UTF-8 at byte 24 \(0xe9\)"):
        read(tmp_path / "a.jsonl")
    kept = read(tmp_path / "a.jsonl", DataConfig(encoding_errors="skip"))
    assert kept == [Document("a.jsonl:1", "x"), Skipped("a.jsonl:2", "not UTF-8"), Document("a.jsonl:3", "y")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a\.jsonl:2: not JSON \(.*line must hold one object"),
        (
            '{"body": "x", "id": 1}',
            r"a\.jsonl:2: no field 'text', but \['body', 'id'\]; set data\.text_field",
        ),
        ('["x"]', r"a\.jsonl:2: no field 'text', but a list"),
        ('{"text": 5}', r"a\.jsonl:2: 'text' is a int, not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_tokenized_pairs_are_known_by_their_files_or_suffix(tmp_path):
    (tmp_path / "c.idx").touch()
    (tmp_path / "text").touch()
    assert tokenized_prefix(str(tmp_path / "c"), None) == tmp_path / "c"
    assert tokenized_prefix("c.bin", tmp_path) == tmp_path / "c"
    assert tokenized_prefix("gone.idx", None) == Path("gone")
    assert tokenized_prefix(str(tmp_path / "text"), None) is None


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.data.tables.find_spec", lambda name: None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(
        DataError, match=r"a\.parquet needs the package pyarrow: pip install 'weft\[parquet\]'"
    ):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"pip install 'weft\[datasets\]'"):
        read("hf:some/data")


def test_nothing_is_imported_to_find_out(monkeypatch):
    assert importlib.util.find_spec("pyarrow") is not None

    def refuse(name, *args, **kwargs):
        raise AssertionError(name)

    monkeypatch.setattr(builtins, "__import__", refuse)
    require("pyarrow", "this")
