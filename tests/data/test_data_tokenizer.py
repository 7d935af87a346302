"""Tokenizers: lossless, deterministic, and what transformers reads back."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from weft.config.errors import DataError
from weft.data.tokenizer import END, Tokenizer, load_tokenizer, train_tokenizer
from weft.spec.data import TokenizerConfig

TEXTS = ["def add(a, b):\n    return a + b\n", "class Sum:\n    pass\n", "naïve café 北京 🙂\n"] * 3
TRAINED = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_trained_tokenizer_is_lossless(text):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.eos_id not in ids


def test_it_has_the_size_asked_for_and_one_control_token():
    assert TRAINED.vocab_size == 300
    assert (TRAINED.bos, TRAINED.eos, TRAINED.bos_id) == (END, END, TRAINED.eos_id)
    assert len(TRAINED.encode("return a + b")) < 12


def test_control_tokens_in_text_are_text_unless_asked_for():
    assert TRAINED.eos_id not in TRAINED.encode(f"a{END}b")
    assert TRAINED.decode(TRAINED.encode(f"a{END}b")) == f"a{END}b"
    assert TRAINED.encode(f"a{END}b", special=True)[1] == TRAINED.eos_id
    assert TRAINED.decode([TRAINED.eos_id]) == ""
    assert TRAINED.decode([TRAINED.eos_id], special=True) == END


def test_training_is_deterministic_across_processes():
    code = (
        "from weft.data.tokenizer import train_tokenizer as t\n"
        "from weft.spec.data import TokenizerConfig as C\n"
        f"print(t({TEXTS!r}, C(vocab_size=300)).fingerprint)"
    )
    prints = {subprocess.check_output([sys.executable, "-c", code], text=True).strip() for _ in range(2)}
    assert prints == {TRAINED.fingerprint}


def test_transformers_reads_what_save_wrote(tmp_path):
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = TRAINED.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (TRAINED.eos_id, TRAINED.bos_id)
    assert len(theirs) == TRAINED.vocab_size


def test_saving_and_loading_gives_the_same_tokenizer(tmp_path):
    TRAINED.save(tmp_path)
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    again.save(tmp_path)  # onto itself
    assert again.fingerprint == TRAINED.fingerprint
    assert (
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "tokenizer.json"))).fingerprint
        == TRAINED.fingerprint
    )


def words(tmp_path, vocabulary, config=None):
    backend = Backend(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerConfig(path=str(tmp_path))


def test_files_that_came_along_go_along_and_nothing_is_cut(tmp_path):
    settings = {"bos_token": {"content": "go"}, "eos_token": "stop", "note": "kept"}
    tokenizer = load_tokenizer(words(tmp_path, ["<unk>", "go", "stop", "a"], settings))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 4)
    assert tokenizer.encode("a a a a a") == [3] * 5
    tokenizer.save(tmp_path / "copy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_ends_named_by_settings_are_kept(tmp_path):
    given = words(tmp_path, ["<unk>", "go", "stop", "a"], {"eos_token": "stop", "note": "kept"})
    load_tokenizer(TokenizerConfig(path=given.path, bos="go", eos="a")).save(tmp_path / "copy")
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path / "copy")))
    assert (again.bos, again.eos) == ("go", "a")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["note"] == "kept"


def test_usual_names_and_settings_find_the_ends(tmp_path):
    config = words(tmp_path, ["<unk>", "<s>", "</s>", "a"])
    assert (load_tokenizer(config).bos_id, load_tokenizer(config).eos_id) == (1, 2)
    named = TokenizerConfig(path=config.path, eos="a")
    assert load_tokenizer(named).eos_id == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; name a tokenizer.json"),
        ("{", "not a tokenizer.json"),
        ("{}", "not a tokenizer.json"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_missing_ends_are_refused(tmp_path):
    config = words(tmp_path, ["<unk>", "a"])
    with pytest.raises(DataError, match=r"names no begin or end token; set data\.tokenizer\.eos"):
        load_tokenizer(config)
    with pytest.raises(DataError, match="has no token '<end>'"):
        load_tokenizer(TokenizerConfig(path=config.path, eos="<end>"))


def test_own_names_for_the_ends():
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=300, bos="<go>", eos="<stop>"))
    assert isinstance(tokenizer, Tokenizer)
    assert {tokenizer.bos_id, tokenizer.eos_id} == {0, 1}
