"""What a report shows of answers: the headline, the curve, and the page of samples, all of it escaped."""

import json
import re
from pathlib import Path

import pytest
from fake_run import write_run
from test_report import report, rewrite, titles

from weft.config.errors import RunError
from weft.train.report import write_report

PNG = "data:image/png;base64,AAAA"
ITEMS = {
    "picture": {"kind": "picture", "png": PNG, "width": 96, "height": 48},
    "video": {"kind": "video", "png": PNG, "width": 96, "height": 48},
    "sound": {"kind": "sound", "seconds": 0.62, "levels": [0.0, 0.5, 1.0]},
    "missing": {"kind": "missing", "reason": "a.png is gone"},
}
ANSWERS = {"accuracy": 0.955, "documents": 359, "shuffled": 0.1, "exchanged": "pictures and sounds"}
ANSWERS |= {"baselines": {"logistic regression on pixels": 0.967, "most frequent answer": 0.0}}


def sample(said: str = "3", answer: str = "3", question: str = "Which?", items: tuple = ("picture",)) -> dict:
    found = {"document": 7, "question": question, "said": said, "answer": answer, "right": said == answer}
    return found | {"items": [ITEMS[name] for name in items], "more": 0}


def answered(run_dir: Path, rows: list[dict], answers: dict = ANSWERS) -> Path:
    """A finished multimodal run, without bits per byte, that shows these samples."""
    run = write_run(run_dir, steps=20, iters=20, moe=False)
    values = {"valid_loss": 0.2, "valid_bits_per_byte": None, "valid_accuracy": 0.5}
    rewrite(run, lambda row: {key: value for key, value in row.items() if "valid" not in key})
    rewrite(run, lambda row: row | values if row["step"] in (5, 10) else row)
    summary = json.loads((run / "summary.json").read_text())
    valid = {"loss": 0.1, "bits_per_byte": None, "bytes": 0, "tokens": 718}
    summary |= {"answers": answers, "valid": valid, "baselines": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = {"documents": 359, "wrong": sum(not row["right"] for row in rows), "shown": rows}
    (run / "predictions.json").write_text(json.dumps(page))
    config = (run / "config.yaml").read_text()
    encoders = "encoders: {vision: {num_hidden_layers: 3, hidden_size: 64}, audio: {kind: audio}}\nplan: {}\n"
    (run / "config.yaml").write_text(config + encoders)
    return run


def test_answers_are_the_headline_of_a_run_that_has_some(tmp_path):
    text = report(answered(tmp_path, [sample()]))
    assert '<div class="big">95.5%</div>' in text
    bars = re.findall(r"<span>([^<]*)</span><div class=\"bar(?: own)?\" style=\"width:([\d.]+)%\">", text)
    assert bars == [
        ("most frequent answer", "0.00"),
        ("this model, pictures and sounds exchanged", "10.34"),
        ("this model", "98.76"),
        ("logistic regression on pixels", "100.00"),
    ]
    assert "model 1.2 points lower" in text
    assert "Accuracy" in titles(text)
    assert "bits per byte" not in text
    assert ">validation 0.100<" in text  # of the closing evaluation
    assert "</code>, encoders <code>vision</code> (3 layers of width 64), <code>audio</code>." in text
    assert "<h3>encoders.vision</h3>" in text
    assert "<td>num_hidden_layers</td>" in text
    assert "<h3>plan</h3>" not in text  # nothing is in it


def test_wrong_answers_are_marked_in_words(tmp_path):
    text = report(answered(tmp_path, [sample("8"), sample(), sample("")]))
    cards = re.findall(r"<figure class=\"card answer.*?</figure>", text)
    assert len(cards) == 3
    assert ["✗ wrong" in card for card in cards] == ['answer wrong"' in card for card in cards]
    assert ["✗ wrong" in card for card in cards] == [True, False, True]
    assert ["✓ right" in card for card in cards] == [False, True, False]
    assert "it is <b>3</b>" in cards[0]
    assert "nothing" in cards[2]
    assert "Of all, 2 are wrong" in text
    assert text.count("Which?") == 1  # every sample asks it


def test_samples_show_what_they_are_made_of(tmp_path):
    rows = [sample(items=tuple(ITEMS)), sample(question="Who?"), sample(items=()) | {"more": 5}]
    text = report(answered(tmp_path, rows))
    assert text.count(f'<img src="{PNG}" width="96" height="48"') == 3
    assert "first frame of a video" in text
    assert 'aria-label="sound, 0.6 s"' in text
    assert "cannot be read: a.png is gone" in text
    assert "and 5 more" in text
    assert "<figcaption>Who?</figcaption>" in text


def test_texts_of_samples_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"\x1b[0m"
    item = {"kind": "picture", "png": "javascript:alert(1)", "width": 1, "height": 1}
    rows = [sample(evil, "a", evil), sample(evil, evil, "b")]
    rows[0]["items"] = [item, {**item, "png": PNG + evil}, {"kind": "missing", "reason": evil}]
    given = ANSWERS | {"exchanged": evil, "baselines": {evil: 0.5}}
    run = answered(tmp_path, rows, given)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("vision:", f"{json.dumps(evil)}:"))
    summary = json.loads((run / "summary.json").read_text()) | {"skipped": {evil: {evil: 2}}}
    (run / "summary.json").write_text(json.dumps(summary))
    text = report(run)
    assert "<script" not in text
    assert "javascript" not in text
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize("page", [{"shown": 1}, {"documents": 1, "wrong": 0, "shown": [{"right": True}]}])
def test_samples_of_another_form_are_refused(tmp_path, page):
    run = answered(tmp_path, [])
    (run / "predictions.json").write_text(json.dumps(page))
    with pytest.raises(RunError, match=r"predictions\.json is not of its form"):
        write_report(run)


def test_accuracy_of_a_run_that_goes_on(tmp_path):
    run = answered(tmp_path, [])
    for name in ("summary.json", "predictions.json"):
        (run / name).unlink()
    text = report(run)
    assert '<div class="big">50.0%</div>' in text
    assert "on a part of the held-out samples" in text
    assert "Accuracy" in titles(text)
