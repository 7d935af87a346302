"""The .bin/.idx pair against an independent reading of its description, and a file of Megatron's own."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.config.errors import DataError
from weft.data.indexed import TokenWriter, check_pointers, open_tokens, prefix_of, scan, token_dtype

MEGATRON = Path(__file__).parent / "fixtures" / "megatron"
MEGATRON_DOCUMENTS = [
    [944, 625, 684, 897, 0],
    [0],
    [578, 775, 833, 225, 56, 300, 0],
    [285, 873, 912, 6, 500, 821, 0],
    [132, 0],
]
CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def twin_write(prefix: Path, sequences: list[list[int]], document_index: list[int], code: int) -> None:
    """The format by the book, with struct."""
    size = struct.calcsize(CODES[code])
    pointers = [size * sum(map(len, sequences[:i])) for i in range(len(sequences))]
    out = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    out += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(document_index))
    out += b"".join(struct.pack("<i", len(s)) for s in sequences)
    out += b"".join(struct.pack("<q", p) for p in pointers)
    out += b"".join(struct.pack("<q", d) for d in document_index)
    Path(f"{prefix}.idx").write_bytes(out)
    Path(f"{prefix}.bin").write_bytes(
        b"".join(struct.pack(f"<{CODES[code]}", t) for s in sequences for t in s)
    )


def twin_read(prefix: Path) -> list[list[int]]:
    """Documents of a pair, with struct."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, count, entries = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    pointers = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    documents = struct.unpack_from(f"<{entries}q", index, 34 + 12 * count)
    assert len(index) == 34 + 12 * count + 8 * entries
    sequences = [
        list(struct.unpack_from(f"<{n}{CODES[code]}", data, p))
        for n, p in zip(lengths, pointers, strict=True)
    ]
    return [sum(sequences[a:b], []) for a, b in zip(documents, documents[1:], strict=False)]


def documents_of(prefix: Path) -> list[list[int]]:
    file = open_tokens(prefix)
    return [file.tokens[file.bounds[d] : file.bounds[d + 1]].tolist() for d in range(file.documents)]


def test_reads_what_megatron_wrote():
    assert documents_of(MEGATRON) == MEGATRON_DOCUMENTS == twin_read(MEGATRON)
    check_pointers(open_tokens(MEGATRON))
    found = scan(open_tokens(MEGATRON), bos=1, limit=1000)
    assert (sum(found.counts), found.counts[0], found.longest, found.bos_led) == (22, 5, 7, False)
    assert len(found.counts) == 945


def test_writes_the_same_bytes_as_megatron(tmp_path):
    sequences = [
        *MEGATRON_DOCUMENTS[:2],
        MEGATRON_DOCUMENTS[2][:3],
        MEGATRON_DOCUMENTS[2][3:],
        *MEGATRON_DOCUMENTS[3:],
    ]
    with TokenWriter(tmp_path / "ours", token_dtype(1000)) as writer:
        for sequence in sequences:
            writer.add(sequence)
    assert (tmp_path / "ours.bin").read_bytes() == Path(f"{MEGATRON}.bin").read_bytes()
    twin_write(tmp_path / "twin", sequences, [0, 1, 2, 4, 5, 6], 8)
    assert (tmp_path / "twin.idx").read_bytes() == Path(f"{MEGATRON}.idx").read_bytes()


@given(
    st.lists(st.lists(st.integers(0, 120), max_size=6), max_size=6),
    st.sampled_from(sorted(CODES)),
    st.data(),
)
def test_any_file_by_the_book_is_read(tmp_path_factory, sequences, code, data):
    prefix = tmp_path_factory.mktemp("pair") / "p"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sequences)), max_size=3)))
    index = [0, *cuts, len(sequences)]
    twin_write(prefix, sequences, index, code)
    assert documents_of(prefix) == twin_read(prefix)
    check_pointers(open_tokens(prefix))


@given(
    st.lists(st.lists(st.integers(0, 65_000), max_size=6), max_size=6), st.sampled_from([np.uint16, np.int32])
)
def test_our_files_are_read_by_the_book(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("pair") / "p"
    with TokenWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    assert twin_read(prefix) == documents == documents_of(prefix)


def test_a_part_holds_its_documents_and_nothing_else():
    part = open_tokens(MEGATRON).part(2, 4)
    assert part.documents == 2
    assert [part.bounds[d] for d in range(3)] == [0, 7, 14]
    assert part.tokens.tolist() == MEGATRON_DOCUMENTS[2] + MEGATRON_DOCUMENTS[3]


def test_the_type_of_tokens_is_megatrons():
    assert [token_dtype(n) for n in (257, 65_499, 65_500, 131_072)] == [
        np.uint16,
        np.uint16,
        np.int32,
        np.int32,
    ]


def test_every_name_of_a_pair_is_its_prefix():
    assert {prefix_of(name) for name in ("a/b", "a/b.bin", "a/b.idx")} == {Path("a/b")}


def copy(tmp_path: Path) -> Path:
    for end in (".bin", ".idx"):
        (tmp_path / f"c{end}").write_bytes(Path(f"{MEGATRON}{end}").read_bytes())
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        (".idx", lambda b: b[:20], r"c\.idx: 20 bytes, but the header alone needs 34"),
        (
            ".idx",
            lambda b: b[:-1],
            r"c\.idx: 153 bytes, but its header \(6 sequences, 5 documents\) needs 154",
        ),
        (".idx", lambda b: b"", r"c\.idx: 0 bytes"),
        (".idx", lambda b: b"NOTMAGIC\0" + b[9:], r"c\.idx: begins with b'NOTMAGIC"),
        (".idx", lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], r"c\.idx: version 2; only version 1"),
        (".idx", lambda b: b[:17] + b"\x07" + b[18:], r"c\.idx: type code 7"),
        (
            ".idx",
            lambda b: b[:-8] + struct.pack("<q", 9),
            r"c\.idx: the document index does not run from 0 to 6",
        ),
        (".bin", lambda b: b[:-2], r"c\.bin: 42 bytes, but c\.idx needs 44 \(22 tokens of 2 bytes\)"),
        (".bin", lambda b: b + b"\0", r"c\.bin: 45 bytes, but c\.idx needs 44"),
    ],
)
def test_damage_is_refused_with_both_sizes(tmp_path, end, change, message):
    prefix = copy(tmp_path)
    path = Path(f"{prefix}{end}")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_tokens(prefix)


def test_modes_of_multimodal_files_are_allowed(tmp_path):
    prefix = copy(tmp_path)
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes() + bytes(6))
    assert documents_of(prefix) == MEGATRON_DOCUMENTS


def test_a_missing_half_is_named(tmp_path):
    prefix = copy(tmp_path)
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"c\.bin: no such file"):
        open_tokens(prefix)


def test_pointers_with_gaps_are_refused(tmp_path):
    prefix = copy(tmp_path)
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    content[34 + 24 + 8 : 34 + 24 + 16] = struct.pack("<q", 12)
    index.write_bytes(content)
    with pytest.raises(DataError, match="do not follow one another"):
        check_pointers(open_tokens(prefix))


def test_ids_outside_the_vocabulary_are_named(tmp_path):
    with pytest.raises(DataError, match=r"megatron\.bin: holds token id 944, .* has 900 tokens \(0 to 899\)"):
        scan(open_tokens(MEGATRON), bos=1, limit=900)
    twin_write(tmp_path / "n", [[1, -3]], [0, 1], 4)
    with pytest.raises(DataError, match="holds token id -3"):
        scan(open_tokens(tmp_path / "n"), bos=1, limit=900)


def test_an_error_while_writing_leaves_no_index(tmp_path):
    with pytest.raises(OverflowError), TokenWriter(tmp_path / "w", np.uint16) as writer:
        writer.add([70_000])
    assert not (tmp_path / "w.idx").exists()
