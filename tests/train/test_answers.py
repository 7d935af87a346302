"""Accuracy, baselines and the page of samples, against scikit-learn's digits and readings by hand."""

import io
import json
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.media_files import chat, image, picture, png, write
from weft.build.model import drawn
from weft.data.digits import held_out, load
from weft.data.media.items import Media
from weft.data.multimodal import Multimodal, open_multimodal
from weft.data.packed import PackedSplit
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.threads import run_threads
from weft.plan.items import Item
from weft.plan.plans import plans_of_run
from weft.recipes.digits import digits_vlm
from weft.spec.layout import LayoutConfig, PlanConfig
from weft.spec.run import RunConfig
from weft.train import answers
from weft.train.answers import Answers, Texts, baselines, fitted, levels, most_frequent, predictions, shown
from weft.train.evaluate import Document, Evaluation, evaluate
from weft.train.metrics import read_rows
from weft.train.run import train
from weft.train.team import assembled

pytest.importorskip("sklearn")
SOME = 40  # digits of each split that are read
EASY = 0.75  # stands for logistic regression, which takes seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two steps of a small sibling of the recipe, windows of several samples."""
    recipe, folder = digits_vlm(), tmp_path_factory.mktemp("digits")
    width = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    vision = replace(recipe.encoders["vision"], **width, num_hidden_layers=1, output_size=16)
    model = replace(
        recipe.model, **width, pattern="M*", num_key_value_heads=1, head_dim=8, mamba_num_heads=2, n_groups=1
    )
    return replace(
        recipe,
        run=replace(recipe.run, dir=str(folder / "run"), threads=1, device="cpu"),
        model=replace(model, mamba_head_dim=16, initializer_range=0.3),
        encoders={"vision": replace(vision, initializer_range=0.3)},
        data=replace(recipe.data, max_documents=SOME, seq_length=160, cache=str(folder / "cache")),
        train=replace(recipe.train, train_iters=2, global_batch_size=4, micro_batch_size=2),
        validation=replace(recipe.validation, eval_interval=1, eval_iters=1),
        scheduler=replace(recipe.scheduler, lr_warmup_iters=1),
        logger=replace(recipe.logger, peak_flops=1e9),
        checkpoint=replace(recipe.checkpoint, save=False, load=""),
    )


@pytest.fixture(scope="module")
def data(config: RunConfig) -> Multimodal:
    return open_multimodal(config.data, config.encoders, config.model.vocab_size, Path(config.cache))


@pytest.fixture(scope="module")
def left(config: RunConfig) -> Path:
    """The directory of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "logistic", lambda: EASY)
        return train(config, {})


@pytest.fixture
def texts(config: RunConfig, data: Multimodal) -> Texts:
    return Texts(data.tokenizer, config.encoders)


def test_what_a_run_leaves(left: Path) -> None:
    summary = json.loads((left / "summary.json").read_text())
    page = json.loads((left / "predictions.json").read_text())
    found = summary["answers"]
    assert found["documents"] == page["documents"] == SOME
    assert found["accuracy"] == pytest.approx(1 - page["wrong"] / SOME)
    assert 0 <= found["shuffled"] <= 1
    assert found["exchanged"] == "pictures"
    assert found["baselines"].keys() == {"logistic regression on pixels", "most frequent answer"}
    assert found["baselines"]["logistic regression on pixels"] == EASY
    first, last = read_rows(left / "metrics.jsonl")
    assert first["valid_bits_per_byte"] is None
    assert 0 <= first["valid_accuracy"] <= 1
    assert "valid_accuracy" not in last
    text = (left / "report.html").read_text()
    assert len(page["shown"]) == 24
    assert text.count('<figure class="card answer') == text.count('<img src="data:image/png') == 24
    assert not [path for path in left.iterdir() if path.name.startswith(".")]


def test_parameters_of_encoders_count(left: Path, config: RunConfig) -> None:
    told = json.loads((left / "summary.json").read_text())["params"]
    assert told == sum(spec.numel for spec in config.modules.params())


def test_the_page_shows_the_digits_of_scikit_learn(left: Path) -> None:
    """Its documents are found by windows; scikit-learn says what they hold."""
    images, labels = load()
    held = [i for i in range(len(labels)) if held_out(i)]
    rows = json.loads((left / "predictions.json").read_text())["shown"]
    for row in rows:
        digit = held[row["document"]]
        assert (row["question"], row["answer"]) == ("Which digit is shown?", str(labels[digit]))
        assert row["right"] == (row["said"] == row["answer"])
        (item,) = row["items"]
        seen = Image.open(io.BytesIO(b64decode(item["png"].split(",")[1])))
        assert seen.size == (item["width"], item["height"]) == (96, 96)
        grey = np.asarray(seen)[6::12, 6::12, 0] / 255 * 16
        assert np.abs(grey - images[digit]).max() < 0.05
    assert len({row["document"] for row in rows}) == len(rows)
    order = [row["right"] for row in rows]
    assert order == sorted(order)


def test_windows_name_their_documents(data: Multimodal) -> None:
    """Against the tokens of the windows themselves."""
    split = data.splits["valid"]
    plan = split.packed(160)
    made = list(split.windows(160, 0, 1))
    assert len(plan) == len(made) > 4
    for batch in made:
        (number,) = batch.samples
        documents = plan.window(number)
        assert batch.lengths == tuple(split.lengths[documents].tolist())
        stored = [split.document(d, 0).future[0].tolist() for d in documents]
        assert batch.future[0].tolist() == sum(stored, [])


LAYOUTS = {
    "one process": (1, PlanConfig()),
    "alike": (4, PlanConfig(decoder=LayoutConfig(tp=2, dp=2), encoders={"vision": LayoutConfig(tp=2, dp=2)})),
    "apart": (
        4,
        PlanConfig(
            decoder=LayoutConfig(ranks="1-3", dp=3), encoders={"vision": LayoutConfig(ranks="0-1", pp=1)}
        ),
    ),
}


def evaluated(config: RunConfig, data: Multimodal, split: PackedSplit, comm: Comm) -> Evaluation:
    """As ``comm``'s ranks see a split."""
    plans = plans_of_run(config, comm.size)
    team = assembled(plans, config.modules, comm, "fp64", torch.device("cpu"), drawn(7))
    windows = ()
    if team.decoder:
        mesh = team.decoder.mesh
        windows = split.windows(160, 0, 4, part=mesh.reader, parts=mesh.layout.readers)
    return evaluate(team, windows, 64, data.media.piece, graded=True)


@pytest.fixture(scope="module")
def alone(config: RunConfig, data: Multimodal) -> Evaluation:
    return evaluated(config, data, data.splits["valid"], SingleComm())


@pytest.mark.parametrize("name", ["alike", "apart"])
def test_ranks_find_the_same_answers(
    name: str, config: RunConfig, data: Multimodal, alone: Evaluation
) -> None:
    ranks, plan = LAYOUTS[name]
    planned = replace(config, plan=plan)
    for found in run_threads(ranks, lambda comm: evaluated(planned, data, data.splits["valid"], comm)):
        assert found.documents == alone.documents
        assert found.accuracy == alone.accuracy
        assert found.loss == pytest.approx(alone.loss, rel=1e-12)


def test_answers_are_those_of_their_documents(data: Multimodal, alone: Evaluation) -> None:
    split = data.splits["valid"]
    plan = split.packed(160)
    assert len(alone.documents) == split.documents
    assert len({found.best for found in alone.documents}) > 1
    for found in alone.documents:
        batch = split.document(plan.window(found.sample)[found.number], 0)
        assert found.targets == tuple(batch.future[0][batch.mask[0]].tolist())


def test_exchanged_pictures_keep_questions_and_answers(data: Multimodal) -> None:
    split = data.splits["valid"]
    other = split.shuffled(3)
    assert len(other.swaps) == split.documents
    for number in range(split.documents):
        one, two = split.document(number, 0), other.document(number, 0)
        assert np.array_equal(one.future, two.future)
        assert one.items[0].item != two.items[0].item


def test_the_most_frequent_answer(data: Multimodal, texts: Texts, config: RunConfig) -> None:
    """Every question is the same here; scikit-learn has the labels."""
    _, labels = load()
    known = [int(labels[i]) for i in range(len(labels)) if not held_out(i)][:SOME]
    held = [int(labels[i]) for i in range(len(labels)) if held_out(i)][:SOME]
    usual = max(dict.fromkeys(known), key=known.count)
    found = most_frequent(data.splits["train"], data.splits["valid"], texts)
    assert found == pytest.approx(held.count(usual) / SOME)
    elsewhere = replace(config.data, source="digits_av")
    assert list(baselines(elsewhere, data.splits["train"], data.splits["valid"], texts)) == [
        "most frequent answer"
    ]


@pytest.mark.parametrize(("wrong", "first"), [(0, 0), (3, 3), (20, 8), (38, 22), (40, 24)])
def test_wrong_ones_come_first_but_do_not_fill_the_page(
    wrong: int, first: int, config: RunConfig, data: Multimodal, texts: Texts, alone: Evaluation
) -> None:
    """Forty samples of which so many are wrong."""
    made = [one._replace(best=one.targets if i >= wrong else (0,)) for i, one in enumerate(alone.documents)]
    given = Answers(data.splits["valid"], Evaluation(0.0, 0, tuple(made)))
    media = Media(config.encoders, config.data.media)
    page = predictions(given, texts, media, 160)
    assert [row["right"] for row in page["shown"]] == [False] * first + [True] * (24 - first)
    assert page["wrong"] == wrong
    assert given.summary({})["accuracy"] == (SOME - wrong) / SOME
    assert given.summary({})["shuffled"] is None


def test_answers_that_differ_look_different(texts: Texts, data: Multimodal) -> None:
    three, end = data.tokenizer.encode("3")[0], data.tokenizer.eos_id
    assert texts.answers(Document(0, 0, (three, end), (three, end))) == ("3", "3")
    assert texts.answers(Document(0, 0, (three, three), (three, end))) == ("33", "3")
    said, right = texts.answers(Document(0, 0, (three, 271), (three, end)))
    assert (said, right) == ("3[271]", "3<|endoftext|>")
    assert Texts(None, {}).answers(Document(0, 0, (4, 2), (4, 3))) == ("4 2", "4 3")


def test_long_texts_lose_their_middle() -> None:
    made = answers.shortened("a" * 200 + "b" * 200)
    assert made == "a" * 120 + " … " + "b" * 120
    assert answers.shortened("a" * 240) == "a" * 240


@pytest.mark.parametrize(
    ("height", "width", "size"), [(8, 8, (96, 96)), (10, 5, (45, 90)), (300, 600, (96, 48))]
)
def test_pictures_fit(height: int, width: int, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = fitted(pixels)
    assert image.size == size
    factor = image.height // height
    if factor:
        assert np.array_equal(np.asarray(image), pixels.repeat(factor, 0).repeat(factor, 1))


def test_levels_of_a_sound() -> None:
    samples = np.repeat(np.arange(96) / 96, 10).astype(np.float32)
    assert levels(-samples) == pytest.approx([(2 * i + 1) / 95 for i in range(48)], abs=1e-3)
    assert levels(np.zeros(5, np.float32)) == [0.0] * 5


def test_an_item_that_is_gone_is_said(config: RunConfig, tmp_path: Path) -> None:
    for form in ("picture", "sound"):
        item = Item("vision", ((1, 4, 4),), 4, (form, 0, "line 3", str(tmp_path / "gone"), 0, 10, 0))
        made = shown(item, Media(config.encoders, config.data.media))
        assert made["kind"] == "missing"
        assert "gone" in made["reason"]


def test_a_broken_sample_is_left_out_and_counted(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat(image(f"{i}.png"), {"type": "text", "text": "What?"}, answer=str(i % 3)) for i in range(30)]
    files = {f"{i}.png": png(picture(seed=i)) for i in range(29)} | {"29.png": b"nothing"}
    source = str(write(tmp_path, rows, **files))
    data = replace(
        config.data, source=source, valid_fraction=0.3, media_errors="skip", cache=str(tmp_path / "cache")
    )
    where = train(replace(config, data=data, run=replace(config.run, dir=str(tmp_path / "run"))), {})
    ((split, reasons),) = json.loads((where / "summary.json").read_text())["skipped"].items()
    assert reasons == {"broken picture": 1}
    assert f"{split}: 1 sample left out (1 broken picture)" in capsys.readouterr().out
    report = (where / "report.html").read_text()
    assert f"<dt>Left out of {split}</dt><dd>1<small>1 broken picture</small></dd>" in report
    assert "logistic" not in report
