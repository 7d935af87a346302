"""The part of the report that shows when the last step's passes ran."""

from collections.abc import Iterable, Iterator
from html import escape

from weft.plan.gantt import svg
from weft.train.record import Record
from weft.train.timeline import Timelines, read_timelines, trace_name
from weft.train.units import printable


def timeline_section(record: Record) -> str:
    """Heading, figures and picture; empty for a run that kept no timeline.

    Raises:
        RunError: ``timeline.json`` is not of its form.
    """
    if not record.timeline:
        return ""
    made = read_timelines(record.timeline)
    tile = "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>"
    tiles = "".join(tile.format(*figure) for figure in _figures(made))
    caption = f"<figcaption>{_words(_caption(made))}</figcaption>"
    picture = f'<figure class="card s6"><h3>Timeline</h3>{svg(made.both)}{caption}</figure>'
    return f'<h2>Schedule</h2><dl class="card tiles">{tiles}</dl><div class="grid">{picture}</div>'


def _figures(made: Timelines) -> Iterator[tuple[str, str, str]]:
    """Label, value and note of each headline figure."""
    ran, told, about = made.executed, made.simulated, made.about
    yield "Step", _time(ran.makespan), f"{_time(told.makespan)} simulated"
    yield "Bubble", f"{ran.bubble_share:.1%}", f"{told.bubble_share:.1%} simulated"
    yield "Activations kept", _numbers(about["kept"]), f"at most {_numbers(about['allowed'])} by the schedule"


def _caption(made: Timelines) -> str:
    about, several = made.about, made.about["stages"] > 1
    stages = f", {about['stages']:,} stages" if several else ""
    parts = f"{about['microbatches']:,} microbatch{'es' * (about['microbatches'] != 1)}"
    words = f"Step {about['step']:,}: {about['schedule']}{stages}, {parts}. "
    if several:
        words += "A lane is the first rank of a pipeline rank. "
    words += "Bubble: the share of time without a pass. Simulated: the same lists with mean measured costs. "
    words += "Kept: passes whose activations are there at one time"
    return (
        f"{words}{', of each pipeline rank' * several}. {trace_name(about['step'])} opens in ui.perfetto.dev."
    )


def _numbers(values: Iterable[int]) -> str:
    """The number, or those of all pipeline ranks where they differ; of many, the least and the most."""
    found = [f"{value:,}" for value in values]
    if len(set(found)) > 1 and len(found) > 8:
        return f"{min(values):,} to {max(values):,}"
    return found[0] if len(set(found)) == 1 else ", ".join(found)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 10 else f"{seconds:.4g} s"


def _words(text: str) -> str:
    return escape(printable(text))
