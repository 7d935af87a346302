"""Import and export: bytes, dtypes, keys and files survive; nothing half-written is ever left."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint_hf.hf_cases import CASES, SIDE, others, publish, random_tensors, same, weights
from tests.tiny import CONFIG, make
from weft.build.model import tensors
from weft.checkpoint import hf_target, shard
from weft.checkpoint.hf import export_hf, import_hf
from weft.checkpoint.load import Checkpoint, open_checkpoint
from weft.checkpoint.model import model_config
from weft.checkpoint.save import save
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError, RunError
from weft.config.load import to_dict
from weft.config.text import dump, parse_file
from weft.models.hf_hybrid import LIVE, read_config, without_mtp, write_config
from weft.parallel.comm import SingleComm


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, shards: int, tmp_path: Path) -> None:
    config, given = CASES[name], random_tensors(CASES[name])
    source = publish(tmp_path / "hf", config, given, shards)
    run = import_hf(source, tmp_path / "run")
    back = export_hf(run, tmp_path / "back")
    assert same(weights(back), given)
    assert others(back) == others(source)
    assert set(SIDE) < set(others(back))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "run"]


def test_the_run_directory(tmp_path: Path) -> None:
    given = random_tensors(CONFIG)
    run = import_hf(publish(tmp_path / "hf", CONFIG, given), tmp_path / "run")
    checkpoint = open_checkpoint(run)
    assert checkpoint.step == 0
    config = model_config(checkpoint)
    assert write_config(config) == write_config(CONFIG)
    assert read_config(json.loads((run / "hf" / "config.json").read_text()))[0] == config
    assert parse_file(run / "config.yaml").values == {"model": to_dict(config)}
    assert sorted(checkpoint.names()) == sorted(f"model/{spec.name}" for spec in config.params())
    qkv = torch.cat([given[f"backbone.layers.2.mixer.{name}_proj.weight"] for name in "qkv"])
    assert same({"": checkpoint.read("model/layers.2.mixer.qkv_proj.weight")}, {"": qkv})
    up = torch.stack([given[f"backbone.layers.1.mixer.experts.{j}.up_proj.weight"] for j in range(8)])
    assert same({"": checkpoint.read("model/layers.1.mixer.experts.up_proj")}, {"": up})
    assert checkpoint.dtype("model/layers.0.mixer.A_log") == torch.float32
    assert checkpoint.dtype("model/layers.0.mixer.in_proj.weight") == torch.bfloat16


def test_live_names_are_read_and_published_names_written(tmp_path: Path) -> None:
    config = without_mtp(CONFIG)
    live = random_tensors(config, LIVE)
    run = import_hf(publish(tmp_path / "hf", config, live), tmp_path / "run")
    back = weights(export_hf(run, tmp_path / "back"))
    stack = live["model.layers.1.mixer.experts.up_proj"]
    assert same({"": back["backbone.layers.1.mixer.experts.5.up_proj.weight"]}, {"": stack[5]})
    assert back.keys() == random_tensors(config).keys()


def test_absent_mtp_tensors_are_a_model_without_mtp(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {name: t for name, t in random_tensors(CONFIG).items() if not name.startswith("mtp.")}
    source = publish(tmp_path / "hf", CONFIG, given)
    run = import_hf(source, tmp_path / "run")
    assert "imported without" in caplog.text
    assert not model_config(open_checkpoint(run)).parts.mtp
    back = export_hf(run, tmp_path / "back")
    assert same(weights(back), given)
    assert others(back) == others(source)


def test_a_tied_head_may_be_absent_but_must_not_differ(tmp_path: Path) -> None:
    config = CASES["tied"]
    given = random_tensors(config)
    head = given.pop("lm_head.weight")
    run = import_hf(publish(tmp_path / "absent", config, given), tmp_path / "run")
    assert same(weights(export_hf(run, tmp_path / "back")), given | {"lm_head.weight": head})
    other = publish(tmp_path / "other", config, given | {"lm_head.weight": torch.zeros_like(head)})
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true"):
        import_hf(other, tmp_path / "refused")


def trained(folder: Path, precision: str = "bf16", **changes: object) -> Path:
    """A run directory as training leaves it."""
    model = make(precision, **changes)
    pieces = [Piece.whole(f"model/{name}", t) for name, t in tensors(model, model.config).items()]
    meta = {"config": dump({"model": to_dict(model.config)})}
    save(folder / "checkpoints", 7, [*pieces, Piece.whole("rng/torch", torch.zeros(3))], meta, SingleComm())
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_bytes(SIDE[name])
    return folder


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_export_of_a_trained_model(precision: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", precision)
    back = export_hf(run, tmp_path / "deep" / "back")
    values = json.loads((back / "config.json").read_text())
    assert values["model_type"] == "nemotron_h"
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (7, 8, None)
    assert values["torch_dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[precision]
    assert set(others(back)) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    again = import_hf(back, tmp_path / "again")
    one, other = open_checkpoint(run), open_checkpoint(again)
    names = [name for name in one.names() if name.startswith("model/")]
    assert same({name: one.read(name) for name in names}, {name: other.read(name) for name in other.names()})


def test_a_changed_model_gets_a_config_of_its_own(tmp_path: Path) -> None:
    run = import_hf(publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG)), tmp_path / "run")
    other = replace(CONFIG, hidden_size=8)
    (run / "hf" / "config.json").write_text(json.dumps(write_config(other)))
    back = export_hf(run / "checkpoints" / "step_0000000", tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["hidden_size"] == CONFIG.hidden_size


@pytest.mark.parametrize("limit", [1, 900, 5000])
def test_shards(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_target, "SHARD_BYTES", limit)
    given = random_tensors(CONFIG)
    run = import_hf(publish(tmp_path / "hf", CONFIG, given), tmp_path / "run")
    back = export_hf(run, tmp_path / "back")
    assert same(weights(back), given)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(given)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in given.values())
    largest = max(t.nbytes for t in given.values())
    for file in back.glob("*.safetensors"):
        held = [name for name, place in index["weight_map"].items() if place == file.name]
        assert sum(given[name].nbytes for name in held) <= max(limit, largest)
    assert same(weights(export_hf(import_hf(back, tmp_path / "run2"), tmp_path / "back2")), given)


def test_no_read_is_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of tensors that training saved in one piece: an expert stack is read block by block, once."""
    block, seen = 1200, []
    monkeypatch.setattr(shard, "PIECE_BYTES", block)
    monkeypatch.setattr(hf_target, "PIECE_BYTES", block)
    real = Checkpoint._fill

    def fill(self: Checkpoint, name: str, piece: object, target: torch.Tensor) -> None:
        seen.append(target.nbytes)
        real(self, name, piece, target)

    run = trained(tmp_path / "run", "fp32")
    monkeypatch.setattr(Checkpoint, "_fill", fill)
    export_hf(run, tmp_path / "back")
    assert max(seen) <= block
    assert sum(seen) == sum(t.nbytes for t in weights(tmp_path / "back").values())


def test_export_replaces_only_its_own(tmp_path: Path) -> None:
    run, back = trained(tmp_path / "run"), tmp_path / "back"
    back.mkdir()
    export_hf(run, back)
    before = {f.name: f.read_bytes() for f in back.iterdir()}
    export_hf(run, back)
    assert {f.name: f.read_bytes() for f in back.iterdir()} == before
    (back / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds README\.md, which the export would remove"):
        export_hf(run, back)
    (back / "README.md").unlink()
    with pytest.raises(CheckpointError, match="weights that weft did not write"):
        export_hf(run, publish(tmp_path / "theirs", CONFIG, random_tensors(CONFIG)))
    with pytest.raises(CheckpointError, match="it exists"):
        export_hf(run, back / "config.json")
    with pytest.raises(CheckpointError, match="it exists"):
        import_hf(back, run)
    assert {f.name: f.read_bytes() for f in back.iterdir()} == before


def test_a_shared_expert_is_part_of_the_format(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", moe_shared_expert_intermediate_size=0)
    with pytest.raises(CheckpointError, match="shared expert in every MoE layer"):
        export_hf(run, tmp_path / "back")


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("which", [0, 1, 4])
def test_a_failing_disk_leaves_nothing(
    call: str, which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG), 2)
    run = import_hf(source, tmp_path / "run")
    old = export_hf(run, tmp_path / "old")
    for work in (lambda: import_hf(source, tmp_path / "new"), lambda: export_hf(run, old)):
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        calls, real = [], getattr(os, call)

        def failing(*args: object, calls: list = calls, real: object = real, **more: object) -> object:
            calls.append(args)
            if len(calls) == which + 1:  # where pathlib does not mind, the work is done all the same
                raise OSError(28, "No space left on device", str(args[0]))
            return real(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                work()
            except (RunError, OSError):
                assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    export_hf(run, old)
    assert same(weights(old), weights(source))


def test_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG))
    torn = tmp_path / ".run.weft-partial"
    (torn / "checkpoints").mkdir(parents=True)
    (torn / "half").write_text("")
    import_hf(source, tmp_path / "run")
    assert not torn.exists()
    assert not (tmp_path / "run" / "half").exists()


def test_two_writers(tmp_path: Path) -> None:
    source = publish(tmp_path / "hf", CONFIG, random_tensors(CONFIG))
    with hf_target.draft(tmp_path / "run"), pytest.raises(CheckpointError, match="another process"):
        import_hf(source, tmp_path / "run")
