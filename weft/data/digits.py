"""The 1,797 handwritten digits of scikit-learn (8 x 8 pixels), seen, or seen and spoken, as JSONL files.

Every fifth digit is held out. Pictures stand inside the lines as PNG files in base64, sounds beside them.
"""

import importlib
import io
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image

from weft.config.errors import DataError
from weft.data.cache import cache_key, cached
from weft.data.speech import VARIANTS, speaker, write_speech

MADE = ("digits", "digits_av")
SPLITS = ("train", "valid")
_HELD = 5  # one digit of so many is held out
_SCALE = 255 / 16  # of a byte per step of scikit-learn's values
_SEEN, _HEARD, _SAME = "Which digit is shown?", "Which digit is spoken?", "Are both digits the same?"
_FORM = 2  # of the files; a change makes them anew


def held_out(index: int) -> bool:
    """Whether a digit belongs to the validation split."""
    return index % _HELD == _HELD - 1


def load() -> tuple[Float64[np.ndarray, "digits 8 8"], Int64[np.ndarray, " digits"]]:
    """Pictures, with values from 0 to 16, and labels.

    Raises:
        DataError: scikit-learn is missing.
    """
    found = _sklearn("datasets").load_digits()
    return found.images, found.target.astype(np.int64)


def logistic() -> float:
    """Held-out accuracy of logistic regression on the pixels, fitted on the training split.

    Raises:
        DataError: scikit-learn is missing.
    """
    linear = _sklearn("linear_model")
    images, labels = load()
    pixels, held = images.reshape(len(images), -1) / 16, np.array([held_out(i) for i in range(len(images))])
    model = linear.LogisticRegression(max_iter=1000).fit(pixels[~held], labels[~held])
    return float(model.score(pixels[held], labels[held]))


def require() -> None:
    """Refuse, with the extra to install, where scikit-learn is missing; nothing is imported."""
    if find_spec("sklearn") is None:
        raise DataError("the handwritten digits need scikit-learn: pip install 'weft[digits]'")


def write_digits(name: str, cache: Path, notify: Callable[[str], None]) -> dict[str, Path]:
    """The JSONL file of each split of ``digits`` or ``digits_av``, made where they are missing.

    Raises:
        DataError: scikit-learn is missing, or the cache cannot be written.
    """
    require()
    spoken = name == "digits_av"
    said_by = speaker() if spoken else ""
    folder = cache / f"{name}-{cache_key(version('scikit-learn'), said_by, _FORM)}"

    def build(folder: Path) -> dict[str, Any]:
        notify(f"writing {name} into {cache}")
        images, labels = load()
        if spoken:
            notify(write_speech(folder))
        make = _spoken_row if spoken else _row
        for split in SPLITS:
            chosen = [i for i in range(len(labels)) if held_out(i) == (split == "valid")]
            rows = (make(i, images, labels) for i in chosen)
            (folder / f"{split}.jsonl").write_text("".join(_lines(rows)), encoding="utf-8")
        return {}

    cached(folder, build)
    return {split: folder / f"{split}.jsonl" for split in SPLITS}


def _lines(rows: Iterator[list[dict[str, Any]]]) -> Iterator[str]:
    return (json.dumps({"messages": row}) + "\n" for row in rows)


def _row(index: int, images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    question = [_image(images[index]), {"type": "text", "text": _SEEN}]
    return _turns(question, str(labels[index]))


def _spoken_row(index: int, images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """The spoken digit is the one seen in half of the samples; held-out samples have voices of their own."""
    draw = np.random.PCG64(index).random_raw(4).astype(object)
    seen = int(labels[index])
    heard = seen if draw[0] % 2 else int(draw[1] % 10)
    asked = (_SEEN, _HEARD, _SAME)[draw[2] % 3]
    answer = {_SEEN: str(seen), _HEARD: str(heard), _SAME: "yes" if seen == heard else "no"}[asked]
    voices = [v for v in range(VARIANTS) if held_out(v) == held_out(index)]
    sound = {"type": "audio", "audio": f"{heard}-{voices[draw[3] % len(voices)]}.wav"}
    return _turns([_image(images[index]), sound, {"type": "text", "text": asked}], answer)


def _turns(question: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _image(values: Float64[np.ndarray, "8 8"]) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(np.round(values * _SCALE).astype(np.uint8)).save(stream, "PNG")
    address = f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": address}}


def _sklearn(module: str) -> Any:
    require()
    return importlib.import_module(f"sklearn.{module}")
