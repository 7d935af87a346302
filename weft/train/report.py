"""report.html: one file that shows a run, made from the files of its directory alone.

It opens without a network, follows the reader's light or dark preference and prints. It is read from

- ``config.yaml``, and ``origins.json`` if there: ``{dotted setting: where its value came from}``;
- ``metrics.jsonl`` (``weft.train.metrics`` lists its keys), which may end anywhere;
- ``summary.json`` once the run has ended: ``{name, params, active_params, flops_per_token, tokens,
  seconds, valid: {loss, bits_per_byte, bytes, tokens}, baselines: {unigram, zlib, lzma}, answers: {accuracy,
  shuffled, exchanged, documents, baselines}, skipped: {split: {reason: samples}}, sample: {prompt, text},
  paths: {report, export, checkpoint}}`` (the first baselines in bits per byte, those of answers shares);
- ``environment.json``, if there: what ``weft.train.environment`` returns;
- ``timeline.json``, if there: what ``weft.train.timeline`` writes;
- ``predictions.json``, if there: what ``weft.train.answers`` writes.
"""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weft.train.metrics import replace_text
from weft.train.record import Record, read_run
from weft.train.report_answers import Compared, answers_section, by_reason, comparison, encoders
from weft.train.report_cards import expert_cards, grid, learning_cards, speed_cards
from weft.train.report_plan import plan_section
from weft.train.report_style import CSS
from weft.train.report_timeline import timeline_section
from weft.train.units import BASELINES, compared, duration, printable, short


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the run directory of a finished, running or interrupted run; its path.

    Raises:
        RunError: not a run directory, a file of it cannot be read, or the report cannot be written.
    """
    path = run_dir / "report.html"
    replace_text(path, render(read_run(run_dir)))
    return path


def render(record: Record) -> str:
    """The whole page. Every text that comes from the run is escaped."""
    sections = [_header(record), _hero(record), _tiles(record), answers_section(record)]
    learning, speed, experts = learning_cards(record), speed_cards(record), expert_cards(record)
    empty = "No finite value has been recorded." if record.rows else "No step has been recorded yet."
    sections.append(f"<h2>Learning</h2>{grid(learning)}" if learning else f"<p>{empty}</p>")
    if speed:
        sections.append(f"<h2>Speed and memory</h2>{grid(speed)}")
    if experts:
        sections.append(f"<h2>Experts</h2>{grid(experts)}")
    sections += [
        plan_section(record),
        timeline_section(record),
        _sample(record),
        _settings(record),
        _environment(record),
    ]
    body = "".join(sections) + "<footer>Made by Weft from the files of the run directory.</footer>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{_html(record.name)} · Weft report</title><style>{CSS}</style>"
        '<meta name="viewport" content="width=device-width,initial-scale=1"></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(record: Record) -> str:
    """Name, how far the run came, and a warning where a number was not finite."""
    done, planned = record.rows[-1]["step"] if record.rows else 0, record.setting("train.train_iters")
    of = f" of {planned:,}" if isinstance(planned, int) else ""
    state = "Not finished" if not record.summary else "Finished" if done == planned else "Ended early"
    sentence = f"{state}: {done:,}{of} steps."
    if pattern := record.setting("model.pattern"):
        sentence += f" Hybrid decoder <code>{_html(pattern)}</code>{encoders(record)}."
    head = f'<div class="muted">Weft training report</div><h1>{_html(record.name)}</h1>'
    text = f'<header>{head}<p class="muted">{sentence}</p></header>'
    if bad := record.not_finite():
        where = f"at {len(bad):,} steps, first at step {bad[0]:,}" if len(bad) > 1 else f"at step {bad[0]:,}"
        text += f'<div class="alert">The loss or the gradient norm was not finite {where}.</div>'
    return text


class _Headline(NamedTuple):
    """A number, how it is written, what it is, of what, and what it must be read against, the best last."""

    value: float
    form: str
    unit: str
    note: str
    bars: list[Compared]


def _hero(record: Record) -> str:
    """The one number that matters, and the baselines it must be read against."""
    found = _accuracy(record) or _bits(record)
    if not found:
        return ""
    widest = max((bar.value for bar in found.bars), default=0.0) or 1.0
    lines = "".join(_line(bar, widest, found.form) for bar in found.bars)
    chart = f'<div class="bars">{lines}</div>' if len(found.bars) > 1 else ""
    return (
        f'<section class="card hero"><div><div class="big">{format(found.value, found.form)}</div>'
        f'<div><b>{found.unit}</b></div><div class="muted">{found.note}</div></div>{chart}</section>'
    )


def _accuracy(record: Record) -> _Headline | None:
    """Of runs whose data has answers."""
    answers, series = record.summary.get("answers") or {}, record.series("valid_accuracy")
    if bars := comparison(answers):
        note = f"of {answers['documents']:,} held-out samples are answered without a wrong token"
        return _Headline(answers["accuracy"], ".1%", "accuracy", note, bars[::-1])
    if not series:
        return None
    note = "at the last evaluation, on a part of the held-out samples"
    return _Headline(float(series.finite[-1]), ".1%", "accuracy", note, [])


def _bits(record: Record) -> _Headline | None:
    """Of runs on text."""
    valid = record.summary.get("valid") or {}
    model, note = valid.get("bits_per_byte"), "on all validation text"
    if valid.get("bytes"):
        note = f"on all {short(valid['bytes'])} bytes of validation text"
    series = record.series("valid_bits_per_byte")
    if model is None and series:
        model, note = float(series.finite[-1]), "at the last evaluation, on a part of the validation text"
    if model is None:
        return None
    given = record.summary.get("baselines") or {}
    known = ((name, given[key]) for key, name in BASELINES.items() if given.get(key))
    bars = [Compared(name, value, compared(model, value)) for name, value in known]
    bars = sorted([*bars, Compared("this model", model, "", True)], key=lambda bar: -bar.value)
    return _Headline(model, ".3f", "bits per byte", note, bars)


def _line(bar: Compared, widest: float, form: str) -> str:
    """One line of the comparison: name, bar from zero, value, and how the model compares with it."""
    words = "" if bar.own else f"<small>model {_html(bar.words)}</small>"
    kind = "bar own" if bar.own else "bar"
    drawn = f'<div class="{kind}" style="width:{100 * bar.value / widest:.2f}%"></div>'
    return f"<span>{_html(bar.name)}</span>{drawn}<span><b>{format(bar.value, form)}</b>{words}</span>"


def _tiles(record: Record) -> str:
    tile = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>"
    tiles = "".join(tile.format(*map(_html, figure)) for figure in _figures(record))
    return f'<dl class="card tiles">{tiles}</dl>' if tiles else ""


def _figures(record: Record) -> Iterator[tuple[str, str, str]]:
    """Headline figures as (label, value, note), as far as they were measured."""
    known = {**(record.rows[-1] if record.rows else {}), **record.summary}
    if params := known.get("params"):
        active = known.get("active_params")
        yield "Parameters", short(params), f"{short(active)} active" if active else ""
    if tokens := known.get("tokens"):
        yield "Tokens", short(tokens), ""
    if seconds := known.get("seconds"):
        yield "Training time", duration(seconds), ""
    if speed := record.series("tokens_per_second"):
        yield "Throughput", f"{short(float(np.median(speed.finite)))} tok/s", "median"
    if mfu := record.series("mfu"):
        yield "FLOPs utilization", f"{np.median(mfu.finite):.1%}", "median share of peak"
    if memory := record.series("memory_gib"):
        yield "Peak memory", f"{memory.finite.max():.2f} GiB", ""
    for split, reasons in (record.summary.get("skipped") or {}).items():
        yield f"Left out of {split}", f"{sum(reasons.values()):,}", by_reason(reasons)


def _sample(record: Record) -> str:
    sample = record.summary.get("sample") or {}
    if not sample.get("text"):
        return ""
    prompt, text = (_html(sample.get(key) or "") for key in ("prompt", "text"))
    return (
        '<h2>Sample</h2><div class="card"><pre>'
        f'<span class="muted">{prompt}</span>{text}</pre><figcaption>The prompt is grey.</figcaption></div>'
    )


def _settings(record: Record) -> str:
    """One table per section of the configuration; values that were set, not defaults, stand out."""
    tables = []
    for name, section in _sections(record.config):
        rows = "".join(_row(path, value, record.origins, name) for path, value in _flat(name, section))
        tables.append(f'<section class="card"><h3>{_html(name)}</h3><table>{rows}</table></section>')
    return f'<h2>Configuration</h2><div class="settings">{"".join(tables)}</div>'


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and content of each part of the configuration that has any; every encoder is one."""
    for name, section in config.items():
        if name == "encoders" and isinstance(section, Mapping):
            yield from ((f"encoders.{encoder}", settings) for encoder, settings in section.items())
        elif section != {}:
            yield name, section


def _row(path: str, value: object, origins: Mapping[str, str], section: str = "") -> str:
    origin = origins.get(path, "")
    kind = ' class="set"' if origin not in ("", "default") else ""
    label = path.removeprefix(f"{section}.")
    third = f"<td>{_html(origin)}</td>" if origins else ""
    return f"<tr{kind}><td>{_html(label)}</td><td>{_html(None if value == '' else value)}</td>{third}</tr>"


def _html(value: object) -> str:
    """Text of the run as HTML shows it, without characters that steer anything."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "–" if value is None else escape(printable(text))


def _flat(path: str, value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{path}.{key}", item)
    else:
        yield str(path), value


def _environment(record: Record) -> str:
    paths = (record.summary.get("paths") or {}).items()
    facts = {**record.environment, **{f"{name} lies in": path for name, path in paths}}
    rows = "".join(_row(str(name), value, {}) for name, value in facts.items())
    return f'<h2>Environment and files</h2><div class="card"><table>{rows}</table></div>' if rows else ""
