"""Hostile and damaged model directories: refused with the right words, and nothing written."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint_hf.hf_cases import publish, random_tensors, weights
from tests.tiny import CONFIG
from weft.checkpoint.hf import import_hf
from weft.checkpoint.load import open_checkpoint
from weft.config.errors import CheckpointError

A = "model-00001-of-00002.safetensors"
B = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q, UP = "backbone.layers.2.mixer.q_proj.weight", "backbone.layers.1.mixer.experts.3.up_proj.weight"


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    """Change all tensors, in one file."""
    tensors = weights(folder)
    change(tensors)
    for file in (A, B, INDEX):
        (folder / file).unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def header(folder: Path, change: Callable[[dict], object], name: str = A) -> None:
    """Change the header of a safetensors file and nothing else."""
    raw = (folder / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def raw(folder: Path, change: Callable[[bytes], bytes], name: str = A) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def first(table: dict) -> str:
    return next(key for key in table if key != "__metadata__")


def point(folder: Path, name: str = "") -> None:
    """Make the index name another file (or the other shard)."""

    def change(values: dict) -> None:
        table = values["weight_map"]
        table[Q] = name or (B if table[Q] == A else A)

    edit(folder, INDEX, change)


def pickles(folder: Path) -> None:
    for file in (A, B, INDEX):
        (folder / file).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def link_out(folder: Path) -> None:
    outside = folder.parent / "secret.safetensors"
    os.rename(folder / A, outside)
    (folder / A).symlink_to(outside)


def double_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{Q}": "{A}", ', 1))


def same_tensor_twice(folder: Path) -> None:
    everything = weights(folder)
    save_file(everything, folder / A, {"format": "pt"})


def double_header(folder: Path) -> None:
    def twice(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        key = first(table)
        text = f'{{"{key}": {json.dumps(table[key])}, '.encode() + data[9 : 8 + length].lstrip()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    raw(folder, twice)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop(Q)),
        f"{Q}: missing, the config makes it (32, 16)",
    ),
    "surplus tensor": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(2))), "x: surplus"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({UP: t[UP].T.contiguous()})),
        f"{UP}: has shape (8, 12), the config makes it (12, 8)",
    ),
    "mixed dtypes": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q].float()})),
        "q_proj.weight is F32, backbone.layers.2.mixer.k_proj.weight is BF16; they become",
    ),
    "quantized": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        f"{Q}: is F8_E4M3; quantized weights are not imported",
    ),
    "one MTP tensor missing": (
        lambda f: rewrite(f, lambda t: t.pop("mtp.layers.1.final_layernorm.weight")),
        "mtp.layers.1.final_layernorm.weight: missing",
    ),
    "MTP that the config does not know": (
        lambda f: edit(f, "config.json", lambda v: v.update(num_nextn_predict_layers=0)),
        "mtp.layers.0.eh_proj.weight: surplus",
    ),
    "truncated shard": (lambda f: raw(f, lambda d: d[:-1]), f"{A}: truncated:"),
    "shard cut in its header": (
        lambda f: raw(f, lambda d: d[:100]),
        f"{A}: truncated or not a safetensors file",
    ),
    "empty shard": (lambda f: raw(f, lambda d: b""), f"{A}: truncated or not a safetensors file"),
    "bytes after the last tensor": (lambda f: raw(f, lambda d: d + b"x"), "1 bytes follow the last tensor"),
    "huge header": (
        lambda f: raw(f, lambda d: b"\xff" * 7 + b"\x7f" + d[8:]),
        "truncated or not a safetensors",
    ),
    "header is no JSON": (lambda f: raw(f, lambda d: d[:8] + b"!" + d[9:]), f"{A}: not JSON"),
    "header nested without end": (
        lambda f: raw(f, lambda d: (200_000).to_bytes(8, "little") + b"[" * 200_000),
        f"{A}: ",
    ),
    "overlapping tensors": (
        lambda f: header(f, lambda t: t[first(t)].update(data_offsets=[0, 0])),
        "cannot have 0 bytes",
    ),
    "negative offsets": (
        lambda f: header(f, lambda t: t[first(t)].update(data_offsets=[-8, 0])),
        "which is not understood",
    ),
    "shape that is no list": (
        lambda f: header(f, lambda t: t[first(t)].update(shape=7)),
        "is not understood",
    ),
    "unknown dtype": (lambda f: header(f, lambda t: t[first(t)].update(dtype="Q4")), "unknown dtype 'Q4'"),
    "duplicate key in a header": (double_header, "stands twice"),
    "duplicate key in the index": (double_index, f"{INDEX}: the key {Q!r} stands twice"),
    "duplicate key in the config": (
        lambda f: raw(f, lambda d: b'{"use_bias": false, ' + d[1:], "config.json"),
        "config.json: the key 'use_bias' stands twice",
    ),
    "one tensor in two shards": (same_tensor_twice, f"stands in both {A} and {B}"),
    "missing shard": (lambda f: (f / B).unlink(), f"{B}: this weight file is missing"),
    "index names another shard": (point, f"{Q}: the index says it stands in"),
    "path traversal": (
        lambda f: point(f, f"../hf/{A}"),
        f"'../hf/{A}' is not the name of a safetensors file",
    ),
    "absolute path": (lambda f: point(f, "/etc/x.safetensors"), "'/etc/x.safetensors' is not the name"),
    "index names a pickle": (lambda f: point(f, "pytorch_model.bin"), "'pytorch_model.bin' is not the name"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: has no weight_map"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX}: not a JSON object"),
    "index is not text": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), f"{INDEX}: not JSON"),
    "link out of the directory": (link_out, f"{A}: leads out of the directory"),
    "pickles": (pickles, "pytorch_model.bin: weights in pickles can run code"),
    "index and single file": (lambda f: (f / "model.safetensors").write_bytes(b""), "remove the one"),
    "no weights": (lambda f: [(f / n).unlink() for n in (A, B, INDEX)], "no model.safetensors and no"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read: No such file"),
    "empty config": (lambda f: (f / "config.json").write_text("{}"), "model_type is None"),
    "another family": (
        lambda f: edit(f, "config.json", lambda v: v.update(model_type="llama")),
        "model_type is 'llama'; weft imports 'nemotron_h'",
    ),
    "config of another model": (
        lambda f: edit(f, "config.json", lambda v: v.update(hidden_size=24)),
        "backbone.embeddings.weight: has shape (61, 16), the config makes it (61, 24)",
    ),
    "more experts than bytes": (
        lambda f: edit(f, "config.json", lambda v: v.update(n_routed_experts=10**12)),
        "2000000000000 experts, but there are",
    ),
    "more MTP depths than bytes": (
        lambda f: edit(f, "config.json", lambda v: v.update(num_nextn_predict_layers=10**12)),
        "expected a whole number of at most 64",
    ),
    "biases": (lambda f: edit(f, "config.json", lambda v: v.update(use_bias=True)), "use_bias: True is not"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_refused_and_nothing_written(kind: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG), 2)
    damage(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        import_hf(source, tmp_path / "out" / "run")
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_is_listed_at_once(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG), 2)
    rewrite(
        source, lambda t: (t.pop(Q), t.update({UP: torch.ones(1), "x": torch.ones(1), "y": torch.ones(1)}))
    )
    (source / "tokenizer.json").unlink()  # not ours to ask for
    with pytest.raises(CheckpointError) as caught:
        import_hf(source, tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert "5 problems" in lines[0]  # the experts' dtypes now differ, too
    for part in (f"{Q}: missing", f"{UP}: has shape", "x: surplus", "y: surplus", "one dtype"):
        assert sum(part in line for line in lines) == 1
    edit(source, "config.json", lambda v: v.update(use_bias=True, n_group=3))
    with pytest.raises(CheckpointError, match=r"(?s)use_bias: True.*n_group: 3 groups"):
        import_hf(source, tmp_path / "run")


def test_very_many_problems_stay_readable(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG), 2)
    rewrite(source, lambda t: t.update({f"x{i}": torch.ones(1) for i in range(300)}))
    with pytest.raises(CheckpointError, match=r"300 problems(?s:.*)and 200 more$"):
        import_hf(source, tmp_path / "run")


def test_flipped_bits_are_refused_or_harmless(tmp_path: Path) -> None:
    """Whatever stands in headers, index or config: no other error than ours, and never a torn run."""
    given = random_tensors(CONFIG)
    source = publish(tmp_path / "hf", CONFIG, given, 2)
    rng = random.Random(0)
    refused = 0
    for number in range(60):
        name = rng.choice([A, B, INDEX, "config.json"])
        original = (source / name).read_bytes()
        length = 8 + int.from_bytes(original[:8], "little") if name in (A, B) else len(original)
        place = rng.randrange(length)
        changed = bytes([original[place] ^ 1 << rng.randrange(8)])
        (source / name).write_bytes(original[:place] + changed + original[place + 1 :])
        run = tmp_path / f"run{number}"
        try:
            import_hf(source, run)
        except CheckpointError:
            refused += 1
            assert not run.exists()
        else:
            open_checkpoint(run).verify()
        (source / name).write_bytes(original)
    assert refused > 30


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory; name one with config.json"):
        import_hf(tmp_path / "absent", tmp_path / "run")


def test_blobs_of_a_cache_are_inside(tmp_path: Path) -> None:
    """A snapshot of the Hugging Face cache holds links to a blob store beside it."""
    source = publish(tmp_path / "snapshots" / "1f", CONFIG, random_tensors(CONFIG), 2)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate((A, B, "tokenizer.json", "config.json")):
        os.rename(source / file, tmp_path / "blobs" / str(number))
        (source / file).symlink_to(f"../../blobs/{number}")
    run = import_hf(source, tmp_path / "run")
    assert (run / "hf" / "tokenizer.json").is_file()


def test_side_files_that_lead_out_are_not_carried(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG))
    (tmp_path / "secret.txt").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert not (import_hf(source, tmp_path / "run") / "hf" / "notes.txt").exists()
