"""The report: complete for a finished run, honest for an unfinished one, self-contained and escaped."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import fake_rows, write_run
from hypothesis import given
from hypothesis import strategies as st

from weft.config.errors import RunError
from weft.train.figures import BINS, binned, load_colors, loss_top, smooth, spread, tick, window_of
from weft.train.metrics import plain
from weft.train.record import Series, read_run
from weft.train.report import write_report
from weft.train.report_cards import load_stats

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "xlink:href", "srcset", "action"}:
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def report(run_dir: Path) -> str:
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "url(http" not in text
    assert "@import" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
        assert "#01" not in svg  # every colour is a variable of the style sheet
    assert (
        "nan"
        not in re.sub(r"base64,\S+", "", text).lower().split("<h2>configuration")[0].split("</style>")[1]
    )
    return text


def titles(text: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", text.split("<h2>Configuration")[0])


def rewrite(run_dir: Path, change) -> None:
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(plain(change(row))) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return report(write_run(tmp_path_factory.mktemp("run"), steps=120, iters=120))


def test_a_finished_run_shows_everything(finished):
    assert titles(finished) == [
        "Training and validation loss", "Loss by objective", "Router losses", "Learning rate",
        "Gradient norm", "Throughput", "Model FLOPs utilization", "Memory",
        "Expert load", "Busiest expert", "Load entropy", "Idle experts", "Router entropy",
    ]  # fmt: skip
    assert "Finished: 120 of 120 steps." in finished
    for text in ("unigram model 2.871", "zlib -9 1.604", "lzma -9e 1.372", "bits per byte", "nats per token"):
        assert f">{text}<" in finished
    for text in (
        "5.41M",
        "2.10M active",
        "492k",
        "Example CPU @ 2.60GHz",
        "command line",
        "recipe stdlib_lm",
    ):
        assert text in finished
    assert finished.count("data:image/png") == 5  # four MoE layers and their key


def test_light_and_dark_and_print(finished):
    assert "prefers-color-scheme:dark" in finished
    assert "@media print" in finished


def test_text_of_the_run_is_escaped(tmp_path):
    run = write_run(tmp_path, steps=20, iters=20)
    evil = "<script>alert('x')</script>&\"\x1b[0m$\\frac"
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"name": evil, "sample": {"prompt": evil, "text": evil}, "paths": {evil: evil}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "origins.json").write_text(json.dumps({"run.name": evil}))
    (run / "environment.json").write_text(json.dumps({evil: evil}))
    (run / "config.yaml").write_text(
        json.dumps({"run": {"name": evil, evil: evil}, "model": {"pattern": evil}})
    )
    unit = evil.replace("\x1b", "")
    rewrite(run, lambda row: {**row, "expert_load": {unit: [0.5, 0.5]}, "router_entropy": {unit: 1.0}})
    text = report(run)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text


def test_the_same_run_gives_the_same_report(tmp_path):
    run = write_run(tmp_path, steps=10, iters=10)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("steps", "moe"), [(1, True), (1, False), (2, False), (3, True)])
def test_an_interrupted_run_of_few_rows(tmp_path, steps, moe):
    run = write_run(tmp_path, steps=steps, iters=600, moe=moe, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    text = report(run)
    assert f"Not finished: {steps} of 600 steps." in text
    assert ">nats per token<" in text
    assert ("Expert load" in titles(text)) is moe
    assert "Sample" not in text


def test_a_run_without_rows(tmp_path):
    text = report(write_run(tmp_path, steps=0, finished=False))
    assert "No step has been recorded yet." in text
    (tmp_path / "metrics.jsonl").unlink()
    assert "No step has been recorded yet." in report(tmp_path)


def test_rows_that_are_not_finite_are_named_and_marked(tmp_path):
    run = write_run(tmp_path, steps=130, iters=600, moe=False, finished=False)
    wrong = dict.fromkeys(("loss", "lm_loss", "mtp_loss", "grad_norm", "memory_gib"), float("nan"))
    rewrite(run, lambda row: row | wrong if row["step"] > 110 else row)
    text = report(run)
    assert "not finite at 20 steps, first at step 111." in text
    assert ">not finite<" in text


def test_a_run_that_was_never_finite(tmp_path):
    run = write_run(tmp_path, steps=5, finished=False)
    rewrite(run, lambda row: {key: value if key == "step" else math.nan for key, value in row.items()})
    assert "No finite value has been recorded." in report(run)


def test_a_spike_does_not_flatten_the_curve(tmp_path):
    run = write_run(tmp_path, steps=200, iters=200, moe=False)
    rewrite(run, lambda row: row | {"lm_loss": 99.0} if row["step"] == 100 else row)
    text = report(run)
    assert "steps lie above the axis, up to 57.3." in text  # 99 nats at 0.4012 tokens per byte
    record = read_run(run)
    train, valid = record.series("lm_loss"), record.series("valid_loss")
    assert loss_top(train, valid, {}) < 10


def test_a_long_run_stays_small(tmp_path):
    run = write_run(tmp_path, steps=5, iters=5)
    rows = fake_rows(3000, 3000, units=())
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(run)
    assert "band: range within 4 steps" in text
    assert len(text) < 1_000_000


def test_many_moe_layers(tmp_path):
    run = write_run(tmp_path, steps=5, iters=5)
    load = {f"layers.{i}": [0.25, 0.75] for i in range(10)}
    rewrite(run, lambda row: row | {"expert_load": load})
    text = report(run)
    assert text.count("data:image/png") == 11


def test_dropped_choices_are_shown_where_capacity_is_limited(tmp_path):
    run = write_run(tmp_path, steps=5, iters=5)
    rate = {"layers.1": 0.25, "layers.4": 0.05}
    rewrite(run, lambda row: row | {"drop_rate": rate, "drop_rate_total": 0.1})
    text = report(run)
    assert titles(text)[-2:] == ["Router entropy", "Drop rate"]
    assert "10.00% of all choices over the run." in text


def test_the_last_evaluation_of_a_finished_run_is_drawn(tmp_path):
    run = write_run(tmp_path, steps=60, iters=60, moe=False)
    rewrite(run, lambda row: {k: v for k, v in row.items() if row["step"] < 60 or "valid" not in k})
    bits = json.loads((run / "summary.json").read_text())["valid"]["bits_per_byte"]
    assert f">validation {bits:.3f}<" in report(run)


def test_an_early_end_is_said(tmp_path):
    assert "Ended early: 10 of 20 steps." in report(write_run(tmp_path, steps=10, iters=20, moe=False))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "has no config.yaml"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "- 1", "holds list where settings belong"),
        ("summary.json", "{", "summary.json cannot be read"),
    ],
)
def test_what_is_not_a_run_directory_is_refused(tmp_path, file, content, message):
    run = write_run(tmp_path, steps=3)
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    with pytest.raises(RunError, match=message):
        write_report(run)


def test_binned_joins_neighbours():
    steps = np.arange(1, 2 * BINS + 2)
    values = np.where(steps % 3 == 0, np.nan, steps.astype(float))
    joined = binned(Series(steps, values))
    assert all(len(part) <= BINS for part in joined)
    for i, (step, mean, low, high) in enumerate(zip(*joined, strict=True)):
        part = values[3 * i : 3 * i + 3]
        known = part[np.isfinite(part)]
        assert step == steps[3 * i : 3 * i + 3].mean()
        assert (mean, low, high) == (known.mean(), known.min(), known.max())


def test_smooth_is_a_running_median():
    values = np.random.default_rng(0).normal(size=130)
    values[[0, 40, 41, 42, 43]] = np.nan
    half = window_of(130) // 2
    for i, value in enumerate(smooth(values)):
        part = values[max(0, i - half) : i + half + 1]
        known = part[np.isfinite(part)]
        assert (math.isnan(value) and not len(known)) or value == np.median(known)
    assert window_of(130) == 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.12))
def test_labels_keep_their_distance_and_order(places, gap):
    placed = spread(sorted(places), gap)
    assert all(b - a >= gap - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    if all(b - a >= gap for a, b in zip(sorted(places), sorted(places)[1:], strict=False)):
        assert placed == pytest.approx(sorted(places))


def test_load_stats_by_hand():
    busiest, entropy, idle = load_stats(np.array([[1.0, 1, 1, 1], [2, 2, 0, 0], [4, 0, 0, 0]]))
    assert busiest.tolist() == [1, 2, 4]
    assert entropy == pytest.approx([1, 0.5, 0])  # ln 2 / ln 4
    assert idle.tolist() == [0, 2, 3]


def test_load_colors_say_less_even_and_more():
    colors = load_colors(np.array([[0.0, 0.5, 1.0, 2.0, 8.0]]))[:, 0]
    assert colors[:, 3].tolist() == [1, 0.5, 0, 0.5, 1]
    assert colors[0, 2] > colors[0, 0]  # blue
    assert colors[4, 0] > colors[4, 2]  # orange
    assert load_colors(np.ones((1000, 3))).shape[:1] == (3,)
    assert load_colors(np.ones((1000, 3))).shape[1] <= 160


def test_ticks():
    assert [tick(v) for v in (0, 5e-5, 0.001, 250, 2500, 10_000, 12_500, 1e6)] == [
        "0", "5e-05", "0.001", "250", "2.5k", "10k", "12.5k", "1M",
    ]  # fmt: skip
    assert tick(12_500, whole=1e5) == "12,500"
