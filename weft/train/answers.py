"""What a model answers in held-out samples: how often it is right, what is easier, and some to look at."""

import io
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from weft.config.errors import DataError
from weft.data.digits import logistic
from weft.data.media.blob import Fault
from weft.data.media.items import Media, Origin
from weft.data.media.sounds import decode
from weft.data.packed import PackedSplit
from weft.data.stream import Split
from weft.data.tokenizer import Tokenizer
from weft.plan.items import Item
from weft.spec.data import DataConfig
from weft.spec.encoder import EncoderConfig
from weft.spec.run import RunConfig
from weft.train.evaluate import Document, Evaluation
from weft.train.metrics import write_json

FILE = "predictions.json"
SHOWN = 24
"""Samples of the page; up to a third of them are wrong ones."""
SIDE = 96
"""Pixels of the longer side of a picture there."""
BARS = 48
"""Bars of a sound there."""
_ITEMS = 4  # of one sample
_LETTERS = 240  # of one text; of more, the middle is left out
_SURVEYED = 4096  # samples of a split that the most frequent answers are taken from
_KINDS = {"picture": "pictures", "sound": "sounds"}  # by the form of an item; all others are videos


@dataclass(frozen=True)
class Answers:
    """A validation split with its answers, as a model sees it.

    Attributes:
        split: what was read.
        given: all of it, evaluated.
        exchanged: the same with items exchanged among samples (``PackedSplit.shuffled``).
        blind: the evaluation of that; None where no sample has items.
    """

    split: PackedSplit
    given: Evaluation
    exchanged: PackedSplit | None = None
    blind: Evaluation | None = None

    def summary(self, baselines: Mapping[str, float]) -> dict[str, Any]:
        """``{accuracy, documents, baselines, shuffled, exchanged}``; the last is what kind of items were."""
        return {
            "accuracy": self.given.accuracy,
            "shuffled": self.blind.accuracy if self.blind else None,
            "documents": len(self.given.documents),
            "baselines": dict(baselines),
            "exchanged": " and ".join(_kinds(self.exchanged)) if self.exchanged else "",
        }


def _kinds(split: PackedSplit) -> list[str]:
    forms = {Origin.of(item).form for item in split.swaps.values()}
    return sorted({_KINDS.get(form, "videos") for form in forms})


def write_answers(
    run_dir: Path,
    answers: Answers,
    config: RunConfig,
    train: Split | PackedSplit,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Write ``predictions.json``; what the summary says.

    Raises:
        RunError: the file cannot be written.
        DataError: scikit-learn is missing where the data is its digits.
    """
    texts, media = Texts(tokenizer, config.encoders), Media(config.encoders, config.data.media)
    write_json(run_dir / FILE, predictions(answers, texts, media, config.data.seq_length))
    packed = isinstance(train, PackedSplit)
    return answers.summary(baselines(config.data, train, answers.split, texts) if packed else {})


class Texts:
    """Questions and answers of samples, as tokens and as text.

    Args:
        tokenizer: of the run; without one there are token numbers.
        encoders: whose tokens are no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, encoders: Mapping[str, EncoderConfig]) -> None:
        self._tokenizer = tokenizer
        self._silent = {t for e in encoders.values() for t in (e.token, e.start_token, e.end_token)}

    def parts(self, split: PackedSplit, document: int) -> list[tuple[bool, tuple[int, ...]]]:
        """Stretches of a document, each with whether it is a target; without tokens of encoders."""
        batch = split.document(document, 0)
        pairs = zip(batch.mask[0].tolist(), batch.future[0].tolist(), strict=True)
        runs = groupby(pairs, key=lambda pair: pair[0])
        return [(counts, tuple(t for _, t in run if t not in self._silent)) for counts, run in runs]

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text; an end token is not shown."""
        if self._tokenizer is None:
            return " ".join(map(str, tokens))
        return self._tokenizer.decode(tokens)

    def exact(self, tokens: Sequence[int]) -> str:
        """Tokens as text, control tokens too; those that have no text as their numbers."""
        if self._tokenizer is None:
            return self.text(tokens)
        return "".join(self._tokenizer.decode([t], special=True) or f"[{t}]" for t in tokens)

    def question(self, split: PackedSplit, document: int) -> str:
        """What a document says before and between its answers."""
        parts = (self.text(tokens) for counts, tokens in self.parts(split, document) if not counts)
        return shortened(" … ".join(part.strip() for part in parts if part.strip()))

    def answers(self, found: Document) -> tuple[str, str]:
        """What the model said and what is right; control tokens are shown where the rest does not differ."""
        said, right = self.text(found.best), self.text(found.targets)
        if said == right and found.best != found.targets:
            said, right = self.exact(found.best), self.exact(found.targets)
        return shortened(said.strip()), shortened(right.strip())


def shortened(text: str) -> str:
    """At most ``_LETTERS`` letters: the beginning and the end."""
    half = _LETTERS // 2
    return text if len(text) <= _LETTERS else f"{text[:half]} … {text[-half:]}"


def baselines(data: DataConfig, train: PackedSplit, valid: PackedSplit, texts: Texts) -> dict[str, float]:
    """Held-out accuracy of what is simpler than the model, by name."""
    found: dict[str, float] = {}
    if data.source == "digits" and not data.blend:
        found["logistic regression on pixels"] = logistic()
    return found | {"most frequent answer": most_frequent(train, valid, texts)}


def most_frequent(train: PackedSplit, valid: PackedSplit, texts: Texts) -> float:
    """Accuracy in ``valid`` of the answer that the same question has most often in ``train``.

    A question that is new gets the answer that is most frequent of all. Of a large split, samples spread
    evenly over it are taken.
    """
    every: Counter[Any] = Counter()
    by_question: defaultdict[Any, Counter[Any]] = defaultdict(Counter)
    for question, answer in _survey(train, texts):
        every[answer] += 1
        by_question[question][answer] += 1
    usual = {question: count.most_common(1)[0][0] for question, count in by_question.items()}
    overall = next((answer for answer, _ in every.most_common(1)), None)
    hits = [usual.get(question, overall) == answer for question, answer in _survey(valid, texts)]
    return sum(hits) / max(1, len(hits))


def _survey(split: PackedSplit, texts: Texts) -> Iterator[tuple[Any, Any]]:
    """Question and answer of some documents, as tokens."""
    for document in spread(range(split.documents), _SURVEYED):
        parts = texts.parts(split, document)
        yield tuple(t for counts, t in parts if not counts), tuple(t for counts, t in parts if counts)


def spread(among: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of a sequence, evenly over it."""
    take = min(count, len(among))
    return [among[i * len(among) // take] for i in range(take)]


def predictions(
    answers: Answers, texts: Texts, media: Media, seq_length: int, count: int = SHOWN
) -> dict[str, Any]:
    """What ``predictions.json`` holds.

    Returns:
        ``{documents, wrong, shown: [{document, question, said, answer, right, items, more}]}``; wrong ones
        first, up to a third of them (more only where too few are right). An item is ``{kind: picture or
        video, png, width, height}`` (an address with the data in it, and pixels), ``{kind: sound, seconds,
        levels}`` (loudness from 0 to 1) or ``{kind: missing, reason}``; ``more`` counts items left out.
    """
    found = answers.given.documents
    wrong, right = ([d for d in found if (d.best == d.targets) is kind] for kind in (False, True))
    bad = min(len(wrong), max(count // 3, count - len(right)))
    chosen = [*spread(wrong, bad), *spread(right, count - bad)]
    plan = answers.split.packed(seq_length)
    rows: list[dict[str, Any]] = []
    for one in chosen:
        document = _numbered(answers.split, plan.window(one.sample), one.number)
        said, answer = texts.answers(one)
        items = [entry.item for entry in answers.split.items(document)]
        row = {"document": document, "question": texts.question(answers.split, document), "said": said}
        row |= {"answer": answer, "right": one.best == one.targets}
        row |= {"items": [shown(item, media) for item in items[:_ITEMS]], "more": len(items[_ITEMS:])}
        rows.append(row)
    return {"documents": len(found), "wrong": len(wrong), "shown": rows}


def _numbered(split: PackedSplit, documents: Iterable[int], number: int) -> int:
    """The document of a window that is this one among those with targets."""
    counted = [d for d in documents if split.document(d, 0).targets[0]]
    return counted[number]


def shown(item: Item, media: Media) -> dict[str, Any]:
    """An item to look at; what can no longer be read is said, for a report must not fail by it."""
    origin = Origin.of(item)
    try:
        if origin.form == "sound":
            data = origin.blobs[0].read(media.limits.max_bytes)
            samples, rate = decode(data, media.limits.max_seconds)
            return {"kind": "sound", "seconds": len(samples) / rate, "levels": levels(samples)}
        image = fitted(media.picture(item))
    except (DataError, Fault) as error:
        return {"kind": "missing", "reason": str(error)}
    kind = "picture" if origin.form == "picture" else "video"
    return {"kind": kind, "png": address(image), "width": image.width, "height": image.height}


def levels(samples: np.ndarray) -> list[float]:
    """Loudest sample of each of ``BARS`` parts of a clip (or of each of its samples), over the loudest."""
    parts = np.array_split(np.abs(samples), min(BARS, len(samples)))
    peaks = np.array([part.max() for part in parts])
    return [round(float(peak), 3) for peak in peaks / max(float(peaks.max()), 1e-9)]


def fitted(pixels: UInt8[np.ndarray, "height width 3"]) -> Image.Image:
    """At most ``SIDE`` pixels long; one that is smaller is enlarged by a whole number, pixel by pixel."""
    image = Image.fromarray(pixels)
    factor = SIDE // max(image.size)
    if factor:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    return image


def address(image: Image.Image) -> str:
    """A picture as an address that holds its data."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"
