"""Files: transformers' load here, ours load there, and ``weft compare`` tells equal from unequal."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint_hf.hf_cases import same
from tests.parity.pairs import Pair
from tests.tiny import CONFIG
from weft.build.model import tensors
from weft.checkpoint.hf import export_hf, import_hf
from weft.checkpoint.load import open_checkpoint
from weft.checkpoint.model import load_model
from weft.checkpoint.save import save
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError, RunError
from weft.config.load import to_dict
from weft.config.text import dump
from weft.infer.compare import compare, measure
from weft.models.hf_hybrid import without_mtp
from weft.ops.segments import Segments
from weft.parallel.comm import SingleComm
from weft.spec.hybrid import HybridConfig

Make = Callable[[HybridConfig, int], Pair]
PLAIN = without_mtp(CONFIG)
TOKENS = torch.arange(24) * 7 % 61


def run_of_ours(pair: Pair, folder: Path) -> Path:
    pieces = [Piece.whole(f"model/{name}", t) for name, t in tensors(pair.ours, pair.config).items()]
    meta = {"config": dump({"model": to_dict(pair.config)})}
    save(folder / "checkpoints", 3, pieces, meta, SingleComm())
    return folder


@pytest.fixture
def both(pair: Make) -> Pair:
    return pair(PLAIN, 6)


@pytest.fixture
def logits(both: Pair) -> torch.Tensor:
    with torch.inference_mode():
        return both.theirs(TOKENS[None], use_cache=False).logits[0]


@pytest.mark.parametrize("original", [True, False], ids=["published names", "live names"])
def test_theirs_load_here(original: bool, both: Pair, logits: torch.Tensor, tmp_path: Path) -> None:
    both.theirs.save_pretrained(tmp_path / "hf", save_original_format=original)
    run = import_hf(tmp_path / "hf", tmp_path / "run")
    model, _ = load_model(run)
    with torch.inference_mode():
        ours = model.logits(TOKENS, Segments((len(TOKENS),)))
    assert measure(logits, ours).agrees
    back = export_hf(run, tmp_path / "back")
    assert (back / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    both.theirs.save_pretrained(tmp_path / "published")
    assert same(
        load_file(back / "model.safetensors"), load_file(tmp_path / "published" / "model.safetensors")
    )


def test_theirs_in_bf16_stay_bf16(both: Pair, tmp_path: Path) -> None:
    both.theirs.bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="5KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    run = import_hf(tmp_path / "hf", tmp_path / "run")
    checkpoint = open_checkpoint(run)
    assert {checkpoint.dtype(name) for name in checkpoint.names()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [PLAIN, CONFIG], ids=["plain", "MTP"])
def test_ours_load_there(config: HybridConfig, pair: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = pair(config, 8)
    back = export_hf(run_of_ours(made, tmp_path / "run"), tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    mine, theirs = model.state_dict(), made.theirs.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert model.config.hybrid_override_pattern == config.parts.main
    assert model.config.num_nextn_predict_layers == len(config.parts.mtp)


def test_compare_agrees(both: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_ours(both, tmp_path / "run")
    back = export_hf(run, tmp_path / "hf")
    assert compare(back, run, [[1, 2, 3], TOKENS.tolist()], []) == 0
    out = capsys.readouterr().out
    assert "top-1 agreement             100.00%" in out
    assert out.rstrip().endswith("they agree")


def test_compare_differs(both: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_ours(both, tmp_path / "run")
    back = export_hf(run, tmp_path / "hf")
    held = load_file(back / "model.safetensors")
    held["backbone.layers.0.mixer.D"] += 0.01
    save_file(held, back / "model.safetensors", {"format": "pt"})
    assert compare(back, run, [[1, 2, 3]], []) == 1
    assert "they differ" in capsys.readouterr().out


def test_compare_of_other_vocabularies(
    both: Pair, pair: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_ours(both, tmp_path / "run")
    other = run_of_ours(pair(replace(PLAIN, vocab_size=70), 0), tmp_path / "other")
    assert compare(export_hf(other, tmp_path / "hf"), run, [[1]], []) == 1
    assert "70 and 61" in capsys.readouterr().out


def test_nan_never_agrees(logits: torch.Tensor) -> None:
    broken = logits.clone()
    broken[0, 0] = torch.nan
    assert not measure(logits, broken).agrees
    assert not measure(broken, broken).agrees
    assert measure(logits, logits).agrees


def test_compare_by_text(both: Pair, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="</s>"))
    words.pre_tokenizer = Whitespace()
    run = run_of_ours(both, tmp_path / "run")
    back = export_hf(run, tmp_path / "hf")
    words.save(str(back / "tokenizer.json"))
    assert compare(back, run, [], ["one two one"]) == 0


@pytest.mark.parametrize(("rows", "message"), [([[1, 61]], "token id 61 .*0 to 60"), ([[]], "empty")])
def test_compare_refuses(rows: list, message: str, both: Pair, tmp_path: Path) -> None:
    run = run_of_ours(both, tmp_path / "run")
    back = export_hf(run, tmp_path / "hf")
    with pytest.raises(RunError, match=message):
        compare(back, run, rows, [])


def test_compare_refuses_what_transformers_cannot_load(both: Pair, tmp_path: Path) -> None:
    run = run_of_ours(both, tmp_path / "run")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(RunError, match="transformers cannot load it"):
        compare(tmp_path / "hf", run, [[1]], [])


def test_compare_refuses_what_is_not_there(both: Pair, tmp_path: Path) -> None:
    run = run_of_ours(both, tmp_path / "run")
    with pytest.raises(RunError, match="no such directory"):
        compare(tmp_path / "absent", run, [[1]], [])
    with pytest.raises(CheckpointError, match="no such directory"):
        compare(run, tmp_path / "absent", [[1]], [])


def test_not_compared_without_transformers(
    both: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of_ours(both, tmp_path / "run")
    back = export_hf(run, tmp_path / "hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert compare(back, run, [[1]], []) == 2
    assert "not compared" in capsys.readouterr().out
