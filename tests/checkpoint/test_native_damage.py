"""Damaged checkpoints are refused, with file and tensor named; so are crafted and newer manifests."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from checkpoint_cases import check_equal, pieces, values

from weft.checkpoint.load import Checkpoint, open_checkpoint
from weft.checkpoint.manifest import Manifest
from weft.checkpoint.save import save
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError
from weft.parallel.comm import SingleComm
from weft.parallel.threads import run_threads


def two_ranks(root: Path, state: dict[str, torch.Tensor]) -> Path:
    """Saved by two ranks, so that there are two shards."""

    def work(comm) -> Path:
        mine = [piece for i, piece in enumerate(pieces(state)) if i % 2 == comm.rank]
        return save(root, 1, mine, {"step": 1}, comm)

    return run_threads(2, work)[0]


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.read(name)


def blamed(checkpoint: Checkpoint, file: str, offset: int) -> str:
    """What an error about this byte must name besides the file."""
    if file == "manifest.json":
        return "the manifest is damaged"
    if offset < checkpoint._files[file].header_size:
        return "the header is damaged"
    for name, record in checkpoint._tensors.items():
        if any(piece.file == file and piece.begin <= offset < piece.end for piece in record.pieces):
            return f"tensor '{name}' is damaged"
    raise AssertionError(f"byte {offset} of {file} belongs to nothing")


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_50_random_bit_flips_are_refused_and_named(tmp_path):
    path = two_ranks(tmp_path, values(1, size=150))
    checkpoint = open_checkpoint(path)
    places = [(file, offset) for file in path.iterdir() for offset in range(file.stat().st_size)]
    rng = random.Random(50)
    kinds = set()
    for file, offset in rng.sample(places, 50):
        bit, what = rng.randrange(8), blamed(checkpoint, file.name, offset)
        flip(file, offset, bit)
        for attempt in (read_all, lambda path: open_checkpoint(path).verify()):
            with pytest.raises(CheckpointError) as found:
                attempt(path)
            assert f"{file}: {what}" in str(found.value), (file, offset, bit)
        flip(file, offset, bit)
        kinds.add((file.name, re.sub("'.*'", "", what)))
    assert len(kinds) == 5  # both headers, both shards' tensors, the manifest
    check_equal(open_checkpoint(path), values(1, size=150))


def test_a_flip_in_every_byte_is_refused(tmp_path):
    """Not at random: one bit in each byte of a small shard, every bit of the manifest."""
    state = {
        "a": torch.arange(20.0),
        "b.weight": torch.ones(3, 5, dtype=torch.bfloat16),
        "c": torch.tensor(7),
    }
    path = save(tmp_path, 1, pieces(state), {"position": 3}, SingleComm())
    shard = path / "rank_00000_000.safetensors"
    clean = shard.read_bytes()
    checkpoint = open_checkpoint(path)
    for offset in range(len(clean)):
        flip(shard, offset, offset % 8)
        with pytest.raises(CheckpointError) as found:
            read_all(path)
        assert f"{shard}: {blamed(checkpoint, shard.name, offset)}" in str(found.value), offset
        shard.write_bytes(clean)
    raw = (path / "manifest.json").read_bytes()
    for position in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(CheckpointError, match="the manifest is damaged"):
            Manifest.decode(bytes(damaged), path / "manifest.json")


def test_verify_lists_all_damage(tmp_path):
    path = two_ranks(tmp_path, values(1))
    checkpoint = open_checkpoint(path)
    first, second = (checkpoint._tensors[f"model/layers.{i}.weight"].pieces[0] for i in (0, 1))
    for piece in (first, second):
        flip(path / piece.file, piece.begin + 5, 3)
    with pytest.raises(CheckpointError) as found:
        checkpoint.verify()
    lines = str(found.value).splitlines()
    assert len(lines) == 2
    assert f"{path / first.file}: tensor 'model/layers.0.weight' is damaged" in lines[0]
    assert f"{path / second.file}: tensor 'model/layers.1.weight' is damaged" in lines[1]


def test_missing_short_and_long_files(tmp_path):
    path = two_ranks(tmp_path / "whole", values(1))
    for name in sorted(file.name for file in path.iterdir()):
        for change in ("delete", "shorten", "lengthen", "empty"):
            shutil.rmtree(tmp_path / "hurt", ignore_errors=True)
            hurt = shutil.copytree(path, tmp_path / "hurt" / path.name) / name
            data = hurt.read_bytes()
            hurt.unlink()
            if change != "delete":
                hurt.write_bytes({"shorten": data[:-1], "lengthen": data + b"\0", "empty": b""}[change])
            with pytest.raises(CheckpointError) as found:
                open_checkpoint(hurt.parent)
            assert str(hurt if name != "manifest.json" else hurt.parent) in str(found.value), (name, change)


def test_a_shard_that_shrinks_or_goes_after_opening(tmp_path):
    path = save(tmp_path, 1, [Piece.whole("w", torch.ones(100))], {}, SingleComm())
    file = path / "rank_00000_000.safetensors"
    checkpoint = open_checkpoint(path)
    checkpoint.read("w")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="tensor 'w' is damaged"):
        checkpoint.read("w")
    file.unlink()
    with pytest.raises(CheckpointError, match="tensor 'w' cannot be read: No such file"):
        checkpoint.read("w")


def test_shards_of_two_steps_do_not_mix(tmp_path):
    """The same names, shapes and sizes, from another step: refused."""
    for step in (1, 2):
        save(tmp_path, step, pieces(values(step)), {"step": step}, SingleComm())
    name = "rank_00000_000.safetensors"
    shutil.copy(tmp_path / "step_0000001" / name, tmp_path / "step_0000002" / name)
    with pytest.raises(CheckpointError, match="the header is damaged"):
        read_all(tmp_path / "step_0000002")
    (tmp_path / "step_0000001").rename(tmp_path / "step_0000003")
    with pytest.raises(CheckpointError, match="the manifest is of step 1; the directory was renamed"):
        open_checkpoint(tmp_path)


def seal(table: dict) -> bytes:
    """A manifest with a right checksum, whatever it says."""
    table.pop("xxh3_128", None)
    text = json.dumps(table)[:-1].encode() + b', "xxh3_128": "'
    return text + xxhash.xxh3_128_hexdigest(text).encode() + b'"\n}\n'


def edit(table: dict, path: str, value: object) -> None:
    *inner, last = path.split("/")
    for key in inner:
        table = table[int(key) if key.isdigit() else key]
    table[last] = value


FILE = "rank_00000_000.safetensors"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "version",
            2,
            "newer Weft (checkpoint format 2, this Weft reads up to 1); upgrade Weft",
        ),
        ("version", "1", "not understood"),
        ("format", "other", "not understood"),
        ("step", -1, "not understood"),
        ("meta", [], "not understood"),
        ("files", {"../w.safetensors": {}}, "not understood"),
        ("files/../evil.safetensors", None, "not understood"),
        ("tensors/w/pieces/0/file", "../../etc/passwd", "not understood"),
        ("tensors/w/pieces/0/file", ["x"], "not understood"),
        ("tensors/w/pieces/0/start", [1, 0], "does not lie in"),
        ("tensors/w/pieces/0/start", [0.0, 0], "not understood"),
        ("tensors/w/pieces/0/shape", [2, 2], "24 bytes for"),
        ("tensors/w/pieces/0/bytes", [0, 24], "do not lie in"),
        ("tensors/w/pieces/0/bytes", [10**6, 10**6 + 24], "do not lie in"),
        ("tensors/w/pieces/0/xxh3_128", "zz", "checksum"),
        ("tensors/w/pieces", [], "do not tile"),
        ("tensors/w/shape", [10**12, 3], "do not tile"),
        ("tensors/w/shape", "23", "not understood"),
        ("tensors/w/dtype", "object", "unknown dtype"),
        ("tensors/w/dtype", ["F32"], "not understood"),
        ("tensors/w", None, "not understood"),
        ("tensors", 3, "not understood"),
    ],
)
def test_crafted_manifests_are_refused(tmp_path, path, value, message):
    place = save(tmp_path, 1, [Piece.whole("w", torch.ones(2, 3))], {}, SingleComm()) / "manifest.json"
    table = json.loads(place.read_bytes())
    place.write_bytes(seal(table))
    read_all(tmp_path)  # the seal itself is accepted
    if path.startswith("files/.."):
        table["files"]["../evil.safetensors"] = table["files"][FILE]
    else:
        edit(table, path, value)
    place.write_bytes(seal(table))
    with pytest.raises(CheckpointError, match=re.escape(message)) as found:
        open_checkpoint(tmp_path)
    assert str(found.value).startswith(f"{place}: ")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", ".x.safetensors", "a/b.safetensors", "x\n"]
)
def test_no_path_leaves_the_directory(tmp_path, name):
    place = save(tmp_path, 1, [Piece.whole("w", torch.ones(2, 3))], {}, SingleComm()) / "manifest.json"
    table = json.loads(place.read_bytes())
    table["files"] = {name: table["files"][FILE]}
    table["tensors"]["w"]["pieces"][0]["file"] = name
    place.write_bytes(seal(table))
    with pytest.raises(CheckpointError, match="is not the name of a file in this directory"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[" * 100_000, b"\xff" * 200, b"null"])
def test_manifests_that_are_not_even_json(tmp_path, raw):
    place = tmp_path / "manifest.json"
    place.write_bytes(raw)
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        open_checkpoint(tmp_path)
    body = raw + b'"xxh3_128": "'
    place.write_bytes(body + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n')
    with pytest.raises(CheckpointError, match="the manifest is not understood"):
        open_checkpoint(tmp_path)
