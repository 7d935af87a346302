"""What is shown of a model's answers: accuracy beside what is easier, and a page of held-out samples."""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from weft.config.errors import RunError
from weft.train.record import Record
from weft.train.units import printable

_PNG = "data:image/png;base64,"
_BAR, _TALL = 2, 36  # a sound: pixels from bar to bar, and height


class Compared(NamedTuple):
    """A value beside the model's: what it is of, and in words how the model compares with it."""

    name: str
    value: float
    words: str
    own: bool = False


def comparison(answers: Mapping[str, Any]) -> list[Compared]:
    """The model's accuracy and all that it is compared with, the best first, of a summary's ``answers``."""
    model = answers.get("accuracy")
    if model is None:
        return []
    others = {**(answers.get("baselines") or {})}
    if answers.get("shuffled") is not None:
        others[f"this model, {answers.get('exchanged') or 'items'} exchanged"] = answers["shuffled"]
    found = [Compared(str(name), value, points(model, value)) for name, value in others.items()]
    return sorted([Compared("this model", model, "", True), *found], key=lambda one: -one.value)


def points(value: float, baseline: float) -> str:
    """Shares compared in words: ``1.9 points higher``, ``equal``."""
    difference = 100 * (value - baseline)
    if abs(difference) < 0.05:
        return "equal"
    return f"{abs(difference):.1f} points {'lower' if difference < 0 else 'higher'}"


def left_out(reasons: Mapping[str, int]) -> str:
    """How many samples the data leaves out, in words."""
    count = sum(reasons.values())
    return f"{count:,} sample{'s' * (count != 1)} left out ({by_reason(reasons)})"


def by_reason(reasons: Mapping[str, int]) -> str:
    """Numbers and reasons: ``2 broken picture, 1 too long``."""
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items()))


def answers_section(record: Record) -> str:
    """Heading and page of held-out samples; empty where the run has none.

    Raises:
        RunError: ``predictions.json`` is not of its form.
    """
    if not record.predictions:
        return ""
    try:
        return _section(record.predictions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"predictions.json is not of its form ({error!r}); restore it from a copy") from error


def _section(found: Mapping[str, Any]) -> str:
    rows = found["shown"]
    questions = {row["question"] for row in rows}
    asked = "" if len(questions) != 1 else f" Asked of each: <q>{_html(*questions)}</q>"
    bad = sum(not row["right"] for row in rows)
    words = f"{len(rows):,} of {found['documents']:,} held-out samples. "
    words += f"Of all, {found['wrong']:,} are wrong, {bad:,} of which come first here. " if bad else ""
    words += "The answer is the most likely token at each place, given the right ones before it."
    cards = "".join(_sample(row, len(questions) > 1) for row in rows)
    return f'<h2>Answers</h2><p class="muted">{words}{asked}</p><div class="answers">{cards}</div>'


def _sample(row: Mapping[str, Any], asked: bool) -> str:
    """One sample: its items, question and answer; a wrong one says so in words and has another frame."""
    items = "".join(_item(item) for item in row["items"])
    if row["more"]:
        items += f"<small>and {row['more']:,} more</small>"
    question = f"<figcaption>{_html(row['question'])}</figcaption>" if asked else ""
    said = f'<div class="said">{_html(row["said"]) or "<small>nothing</small>"}</div>'
    verdict = "<small>✓ right</small>"
    if not row["right"]:
        verdict = f"<small><b>✗ wrong</b>, it is <b>{_html(row['answer'])}</b></small>"
    kind = "card answer" if row["right"] else "card answer wrong"
    return f'<figure class="{kind}"><div class="items">{items}</div>{question}{said}{verdict}</figure>'


def _item(item: Mapping[str, Any]) -> str:
    """A picture, the first frame of a video, a sound as a drawing, or why there is none."""
    kind = item["kind"]
    if kind == "sound":
        return _wave(item["levels"], f"sound, {item['seconds']:.1f} s")
    if kind == "missing":
        return f"<small>cannot be read: {_html(item['reason'])}</small>"
    name = "first frame of a video" if kind == "video" else "picture"
    if not str(item["png"]).startswith(_PNG):
        return f"<small>{name}</small>"
    size = f'width="{int(item["width"])}" height="{int(item["height"])}"'
    note = "" if kind == "picture" else f"<small>{name}</small>"
    return f'<span><img src="{_html(item["png"])}" {size} alt="{name}">{note}</span>'


def _wave(levels: list[float], name: str) -> str:
    """Loudness over time, as bars around a line."""
    heights = [max(1.0, _TALL * min(1.0, float(level))) for level in levels]
    bars = "".join(
        f'<rect x="{_BAR * i}" y="{(_TALL - height) / 2:.1f}" width="{_BAR - 0.6}" height="{height:.1f}"/>'
        for i, height in enumerate(heights)
    )
    box = f'viewBox="0 0 {_BAR * max(1, len(levels))} {_TALL}"'
    drawn = f'<svg class="wave" {box} role="img" aria-label="{name}">{bars}</svg>'
    return f"<span>{drawn}<small>{name}</small></span>"


def encoders(record: Record) -> str:
    """``, encoders ...`` with the size of each, as HTML; empty for a run that has none."""
    found = record.setting("encoders") or {}
    words = ", ".join(_encoder(str(name), one) for name, one in found.items())
    return f", encoder{'s' * (len(found) > 1)} {words}" if found else ""


def _encoder(name: str, settings: object) -> str:
    sizes = settings if isinstance(settings, Mapping) else {}
    layers, width = (sizes.get(key) for key in ("num_hidden_layers", "hidden_size"))
    more = f" ({_html(layers)} layers of width {_html(width)})" if layers and width else ""
    return f"<code>{_html(name)}</code>{more}"


def _html(value: object) -> str:
    """Text of the run as HTML shows it, without characters that steer anything."""
    return escape(printable(str(value)))
