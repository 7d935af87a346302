"""Bad input at the command line: one clear message, the right exit status, no traceback."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from weft.data.indexed import TokenWriter
from weft.recipes.cli import main

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
SETTINGS, FAILED = 2, 1


def missing(folder: Path) -> list[str]:
    return [f"data.source={folder / 'absent.txt'}"]


def empty(folder: Path) -> list[str]:
    (folder / "corpus").mkdir()
    return [f"data.source={folder / 'corpus'}"]


def blank(folder: Path) -> list[str]:
    (folder / "blank.txt").touch()
    return [f"data.source={folder / 'blank.txt'}"]


def truncated(folder: Path) -> list[str]:
    for suffix in (".bin", ".idx"):
        shutil.copy(FIXTURES / f"megatron{suffix}", folder / f"cut{suffix}")
    index = folder / "cut.idx"
    index.write_bytes(index.read_bytes()[:-5])
    return [f"data.source={folder / 'cut'}"]


def latin(folder: Path) -> list[str]:
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    return [f"data.source={folder / 'latin.txt'}"]


def large_id(folder: Path) -> list[str]:
    with TokenWriter(folder / "large", np.int32) as writer:
        writer.add([5, 70_000, 7])
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "word": 2}, unk_token="</s>"))
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(folder / "tokenizer.json"))
    return [f"data.source={folder / 'large'}", f"data.tokenizer.path={folder / 'tokenizer.json'}"]


CASES: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "a missing file": (missing, SETTINGS, "absent.txt: no such file"),
    "an empty folder": (empty, SETTINGS, "empty"),
    "an empty file": (blank, FAILED, "empty"),
    "a truncated .idx": (truncated, SETTINGS, "truncated"),
    "not UTF-8": (latin, FAILED, "latin.txt: not UTF-8 at byte 3 (0xe9)"),
    "a token id beyond the vocabulary": (large_id, FAILED, "70000"),
    "an unknown letter": (lambda _: ["model.pattern=MX*"], SETTINGS, "unknown letter 'X' at position 1"),
    "fewer experts than top-k": (
        lambda _: ["model.n_routed_experts=2", "model.num_experts_per_tok=3"],
        SETTINGS,
        "3 experts per token, but there are only 2 experts",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_message(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, status, words = CASES[case]
    run = [f"run.dir={tmp_path / 'runs' / 'one'}", "run.device=cpu", "data.tokenizer.vocab_size=300"]
    assert main(["train", "nemotron3_super_pretrain_tiny", *run, *make(tmp_path)]) == status
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    head, *rest = error.splitlines()
    if status == SETTINGS:
        assert head == "weft: 1 problem in the configuration:"
        assert len(rest) == 1
    else:
        assert head.startswith("weft: ")
        assert not rest
