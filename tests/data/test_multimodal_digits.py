"""The handwritten digits, seen and spoken: pixels and labels of scikit-learn, split once for all."""

import json

import numpy as np
import pytest
from media_files import AUDIO, VISION, index, settings

from weft.data import digits, speech
from weft.data.packed import PackedLoader

pytest.importorskip("sklearn")
SEEN = {
    "vision": VISION.__class__(
        **{f: getattr(VISION, f) for f in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{f: getattr(VISION, f) for f in ("intermediate_size", "output_size", "projector_size", "token")},
        patch=2, min_patches=16, max_patches=16, mean=(0.0,) * 3, std=(1.0,) * 3,
    ),
    "audio": AUDIO,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return index(settings("digits"), tmp_path_factory.mktemp("digits"), SEEN)


def answer(data, split, document):
    """The text that counts, without the end token."""
    batch = data.splits[split].document(document, 0)
    return data.tokenizer.decode(batch.future[0][batch.mask[0]])


def test_pixels_labels_and_split(data):
    images, labels = digits.load()
    assert {name: split.documents for name, split in data.splits.items()} == {"train": 1438, "valid": 359}
    order = {"train": [i for i in range(1797) if i % 5 != 4], "valid": range(4, 1797, 5)}
    for name, numbers in order.items():
        for document in range(0, len(numbers), 60):
            number = numbers[document]
            assert answer(data, name, document) == str(labels[number])
            (found,) = data.splits[name].items(document)
            blocks = data.media.load(found.item, 0).reshape(
                2, 2, 2, 2, 3, 2, 2
            )  # rows, columns, inner ones, ...
            pixels = blocks.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, 8, 8)
            np.testing.assert_allclose(
                pixels, np.round(images[number] * 255 / 16)[None].repeat(3, 0) / 255, atol=1e-6
            )


def test_batches_of_digits(data):
    loader = PackedLoader(data.splits["train"], 512, 0, 0)
    batch = loader.microbatch(0, len(loader.plan(0)))
    assert len(batch.items) == 1438
    assert batch.targets == (2 * 1438,)
    assert len(batch.tokens) / (512 * len(batch.samples)) > 0.9


def test_shuffled_pictures_tell_nothing(data):
    """A reader of pictures alone is right as often as by chance."""
    split = data.splits["valid"]
    label = {split.items(d)[0].item: answer(data, "valid", d) for d in range(split.documents)}
    twin = split.shuffled(0)
    right = sum(label[twin.items(d)[0].item] == answer(data, "valid", d) for d in range(split.documents))
    assert right / split.documents < 0.15


def test_logistic_regression():
    assert 0.94 <= digits.logistic() <= 0.98


@pytest.mark.parametrize("program", ["espeak-ng", ""])
def test_digits_seen_and_spoken(tmp_path, monkeypatch, program):
    if program and not speech.speaker():
        pytest.skip("espeak-ng is not installed")
    if not program:
        monkeypatch.setattr(digits, "speaker", str)
        monkeypatch.setattr(speech, "speaker", str)
    notes = []
    made = digits.write_digits("digits_av", tmp_path, notes.append)
    assert ("tones" in notes[1]) == (not program)
    lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in made.items()}
    rows = {name: [json.loads(line)["messages"] for line in some] for name, some in lines.items()}
    assert {name: len(r) for name, r in rows.items()} == {"train": 1438, "valid": 359}
    voices = {name: {m[0]["content"][1]["audio"].split("-")[1] for m in r} for name, r in rows.items()}
    assert not voices["train"] & voices["valid"]
    same = [m[1]["content"] for m in rows["train"] if "same" in m[0]["content"][2]["text"]]
    assert 0.4 < same.count("yes") / len(same) < 0.7
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows["train"][:20]))
    for wave in made["train"].parent.glob("*.wav"):
        (tmp_path / wave.name).write_bytes(wave.read_bytes())
    split = index(settings(few), tmp_path / "cache", SEEN).splits["train"]
    assert [found.item.encoder for found in split.items(0)] == ["vision", "audio"]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(digits.DataError, match=r"pip install 'weft\[digits\]'"):
        digits.logistic()
