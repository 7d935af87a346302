"""Timelines as one SVG, one above the other on the same time scale: what each rank does, and what it keeps.

Lanes are ranks. Hue is the op, shade is the stage among those of the rank; thin lanes below are transfers and
the other streams. With too many boxes for titles and numbers, those of one kind become one path per lane, no
finer than can be seen.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import NamedTuple

from weft.plan.schedule import COMPUTE
from weft.plan.timeline import STREAMS, Level, Span, Timeline

_WIDTH, _LEFT, _RIGHT = 1200, 62, 14  # of the picture and its margins, in pixels
_HEAD, _LEGEND, _AXIS, _GAP, _STRIP, _THIN = 26, 30, 34, 22, 54, 4  # heights
_TITLED = 9_000  # boxes up to which each has a title
_DRAWN = 150_000  # boxes that a picture has at most, so many on each pixel's width of a lane
_THIN_LANES = 16  # ranks up to which streams other than compute are shown
_LINES = 5  # ranks whose memory is drawn
# Of text and lines: the reader's text colour, so that a page in dark colours needs no picture of its own.
_MUTED, _LANE, _LINE = (
    'fill-opacity=".65"',
    'fill-opacity=".06"',
    'stroke="currentColor" stroke-opacity=".15"',
)
# What a box can be -> hue, saturation and lightness (of the first stage of a rank), words of the legend.
_LOOKS: dict[str, tuple[int, int, int, str]] = {
    "F": (212, 68, 52, "forward"),
    "BW": (158, 52, 38, "backward"),
    "B": (96, 48, 44, "B: of inputs"),
    "W": (32, 84, 52, "W: of weights"),
    "STEP": (280, 24, 48, "STEP"),
    "GATHER": (330, 45, 62, "GATHER"),
    "REDUCE": (0, 58, 58, "REDUCE"),
    "OUT": (255, 55, 68, "OUT"),
    "IN": (190, 55, 48, "IN"),
}


class _Box(NamedTuple):
    """A rectangle in pixels, what it looks like, and the span it stands for."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    span: Span


@dataclass(frozen=True)
class _Scale:
    """Seconds, or what the clock counts, to pixels and to words."""

    seconds: float
    clock: str

    def x(self, time: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * time / self.seconds

    @property
    def unit(self) -> tuple[str, float]:
        """Milliseconds, unless all of the picture is far shorter or longer; thousands of other clocks."""
        if self.clock != "s":
            power = min(5, max(0, int(math.log10(self.seconds) / 3)))
            return ("", "k", "M", "G", "T", "P")[power] + self.clock, 1000.0**-power
        return ("µs", 1e6) if self.seconds < 5e-4 else ("ms", 1e3) if self.seconds < 50 else ("s", 1.0)

    def words(self, time: float) -> str:
        name, factor = self.unit
        return f"{time * factor:.4g} {name}"

    def ticks(self) -> list[float]:
        """Round numbers of seconds, about ten."""
        rough = self.seconds / 10
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * round_ for round_ in (1, 2, 5, 10) if power * round_ >= rough)
        return [i * step for i in range(int(self.seconds / step + 1e-9) + 1)]


def svg(
    timelines: Mapping[str, Timeline],
    size: Callable[[str], float] | None = None,
    unit: str = "microbatches",
    clock: str = "s",
) -> str:
    """SVG text of named timelines, such as ``executed`` and ``simulated``, each from its own start.

    What is live is not drawn where that is never more than one microbatch.

    Args:
        timelines: by name, in the order shown.
        size: how much a forward pass of a stage keeps, in ``unit``; 1 if not given.
        unit: of the strip of what is live.
        clock: what times count, if not seconds.
    """
    timelines = {name: line.shifted(-line.start) for name, line in timelines.items()}
    scale = _Scale(max((line.makespan for line in timelines.values()), default=0.0) or 1.0, clock)
    lanes = sum(len(line.ranks) for line in timelines.values())
    top, parts, boxes, notes = float(_LEGEND), list[str](), list[_Box](), dict[str, None]()
    for name, line in timelines.items():
        parts.append(_heading(name, line, scale, top + _HEAD - 10))
        panel = _Panel(line, scale, top + _HEAD)
        parts += panel.lanes()
        boxes += panel.boxes()
        notes |= dict.fromkeys(panel.notes())
        top = panel.bottom + _GAP
        if max(line.peaks().values(), default=0.0) > 1:
            parts += _strip(line, scale, top, size, unit)
            top += _STRIP + _GAP
    titled = len(boxes) <= _TITLED
    drawn = _titled(boxes, scale) if titled else _joined(boxes, max(0.1, 1100 * lanes / _DRAWN))
    looks = dict.fromkeys(_look(box) for box in boxes)
    height = top - _GAP + _AXIS
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
            'font-family="system-ui,sans-serif" font-size="12" fill="currentColor">',
            f"<title>{escape(' and '.join(timelines))} on the same time scale</title>{_HATCH}",
            *_legend([look for look in _LOOKS if look in looks], titled and "WAIT" in looks, notes),
            *_axis(scale, _LEGEND + _HEAD, top - _GAP),
            *parts,
            *drawn,
            "</svg>\n",
        ]
    )


_HATCH = (
    '<defs><pattern id="weft-wait" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><path d="M0 0v5" stroke="#808080" stroke-width="1.4" opacity=".55"/>'
    "</pattern></defs>"
)


class _Panel:
    """Places of the lanes and boxes of one timeline."""

    def __init__(self, line: Timeline, scale: _Scale, top: float) -> None:
        self.line, self.scale, self.top = line, scale, top
        self.high = max(5.0, min(24.0, 400 / max(1, len(line.ranks))))
        streams = {span.stream for span in line.spans} - {"compute"}
        known = [name for name in STREAMS if name in streams] + sorted(streams.difference(STREAMS))
        self.thin = known if len(line.ranks) <= _THIN_LANES else []
        self.step = self.high + _THIN * len(self.thin) + (6 if self.thin else 1)
        self.bottom = top + self.step * len(line.ranks)
        stages: defaultdict[int, set[str]] = defaultdict(set)
        for span in line.spans:
            if span.action.op in COMPUTE:
                stages[span.rank].add(span.action.unit)
        self.stages = {
            rank: {
                name: place for place, name in enumerate(sorted(names, key=lambda name: (len(name), name)))
            }
            for rank, names in stages.items()
        }
        split = (span for span in line.spans if span.action.op == "W" and span.end > span.start)
        self.split = {(span.rank, span.action) for span in split}

    def notes(self) -> Iterator[str]:
        """What the legend says of shades and thin lanes."""
        if any(len(stages) > 1 for stages in self.stages.values()):
            yield "lighter: later stages of a rank"
        if self.thin:
            yield f"thin lanes: {', '.join(self.thin)}"

    def lanes(self) -> Iterator[str]:
        """Background and name of each rank; not all names where lanes are low."""
        every = max(1, math.ceil(11 / self.step))
        wide = _WIDTH - _LEFT - _RIGHT
        for place, rank in enumerate(self.line.ranks):
            y = self.top + place * self.step
            words = f"rank {rank}: {self.line.busy_shares[rank]:.1%} busy"
            yield (
                f'<rect x="{_LEFT}" y="{y:.1f}" width="{wide}" height="{self.high:.1f}" {_LANE} '
                f"><title>{words}</title></rect>"
            )
            if place % every == 0:
                middle = f'x="{_LEFT - 8}" y="{y + self.high / 2 + 4:.1f}" text-anchor="end"'
                yield f'<text {middle} {_MUTED} font-size="11">rank {rank}</text>'

    def boxes(self) -> Iterator[_Box]:
        """All that can be seen."""
        place = {rank: i for i, rank in enumerate(self.line.ranks)}
        for span in self.line.spans:
            x, end = self.scale.x(span.start), self.scale.x(span.end)
            if end - x < 0.02:
                continue
            y, high = self.top + place[span.rank] * self.step, self.high
            if span.stream in self.thin:
                y += self.high + 1 + _THIN * self.thin.index(span.stream)
                high = _THIN - 1.0
            elif span.stream != "compute":
                continue
            yield _Box(x, y, end - x, high, self._fill(span), span)

    def _fill(self, span: Span) -> str:
        op, unit = span.action.op, span.action.unit
        if op == "WAIT":
            return "url(#weft-wait)"
        if op == "POST":
            return _colour("B" if span.action.back else "F", 0.0)
        if op == "B" and (span.rank, span.action._replace(op="W")) not in self.split:
            op = "BW"
        stages = self.stages.get(span.rank, {})
        return _colour(op, stages.get(unit, 0) / max(1, len(stages) - 1))


@cache
def _colour(look: str, shade: float) -> str:
    """Of the first (0) to the last (1) stage of a rank."""
    hue, saturation, light, _ = _LOOKS.get(look, (0, 0, 60, ""))
    return f"hsl({hue} {saturation}% {light + (82 - light) * 0.6 * shade:.0f}%)"


def _look(box: _Box) -> str:
    """The entry of the legend that explains a box."""
    op = box.span.action.op
    hue = box.fill.split(" ", 1)[0]
    return "BW" if op == "B" and hue == _colour("BW", 0).split(" ", 1)[0] else op


def _titled(boxes: Sequence[_Box], scale: _Scale) -> Iterator[str]:
    """One rectangle each, those of one colour together, and numbers where they fit."""
    groups: defaultdict[str, list[_Box]] = defaultdict(list)
    for box in boxes:
        groups[box.fill].append(box)
    for fill, group in groups.items():
        yield f'<g fill="{fill}">'
        for x, y, width, high, _, span in group:
            length = scale.words(span.end - span.start)
            words = f"{span.action} {span.stream}: {scale.words(span.start)} + {length}"
            gap = 0.6 if width > 3 else 0.0  # neighbours of one colour stay apart
            yield (
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.2, width - gap):.1f}" height="{high:.1f}">'
                f"<title>{escape(words)}</title></rect>"
            )
        yield "</g>"
    yield '<g font-size="10" text-anchor="middle" fill="#fff" pointer-events="none">'
    for x, y, width, high, fill, span in boxes:
        words = str(span.action.microbatch)
        if span.action.op in COMPUTE and high >= 10 and width >= 6 * len(words) + 3:
            dark = ' fill="#111"' * (int(fill[-4:-2]) > 60)
            yield f'<text x="{x + width / 2:.1f}" y="{y + high / 2 + 3.5:.1f}"{dark}>{words}</text>'
    yield "</g>"


def _joined(boxes: Sequence[_Box], grain: float) -> Iterator[str]:
    """One path for all boxes of one lane and colour, their ends rounded to multiples of ``grain`` pixels."""
    paths: defaultdict[tuple[str, float, float], list[_Box]] = defaultdict(list)
    for box in boxes:
        if box.span.action.op != "WAIT":
            paths[box.fill, box.y, box.height].append(box)
    for (fill, y, high), group in paths.items():
        words, last = [f"M0 {y + high / 2:.1f}"], 0
        for box in group:
            start, end = round(box.x / grain), round((box.x + box.width) / grain)
            if end > start:
                words.append(f"m{(start - last) * grain:.4g} 0h{(end - start) * grain:.4g}")
                last = end
        yield f'<path stroke="{fill}" stroke-width="{high:.1f}" fill="none" d="{"".join(words)}"/>'


def _heading(name: str, line: Timeline, scale: _Scale, y: float) -> str:
    words = f"{scale.words(line.makespan)}, bubble {line.bubble_share:.1%}"
    return (
        f'<text x="{_LEFT}" y="{y:.1f}" font-size="13"><tspan font-weight="600">{escape(name)}</tspan>'
        f'<tspan dx="10" {_MUTED}>{words}</tspan></text>'
    )


def _legend(looks: Sequence[str], waits: bool, notes: Iterable[str]) -> Iterator[str]:
    """A square and a word for each kind of box, then the notes."""
    x = float(_LEFT)
    entries = [(_colour(look, 0.0), _LOOKS[look][3]) for look in looks]
    for fill, words in [*entries, *([("url(#weft-wait)", "WAIT")] if waits else [])]:
        yield f'<rect x="{x:.0f}" y="8" width="12" height="12" fill="{fill}"/>'
        yield f'<text x="{x + 17:.0f}" y="18" {_MUTED}>{words}</text>'
        x += 34 + 6.6 * len(words)
    yield f'<text x="{x:.0f}" y="18" {_MUTED}>{escape("; ".join(notes))}</text>'


def _axis(scale: _Scale, top: float, bottom: float) -> Iterator[str]:
    """Lines through all panels and numbers below them."""
    name, factor = scale.unit
    for time in scale.ticks():
        x = f"{scale.x(time):.1f}"
        yield f'<path d="M{x} {top:.0f}V{bottom + 5:.0f}" {_LINE} stroke-width=".7"/>'
        words = f"{time * factor:.6g}" + f" {name}" * (time == 0)
        yield f'<text x="{x}" y="{bottom + 19:.0f}" text-anchor="middle" {_MUTED}>{words}</text>'


def _strip(
    line: Timeline, scale: _Scale, top: float, size: Callable[[str], float] | None, unit: str
) -> Iterator[str]:
    """What is live over time, as steps, of all ranks or of some from the first to the last."""
    live = line.live(size)
    peaks = {rank: max((level.value for level in live[rank]), default=0.0) for rank in live}
    highest = max(peaks.values(), default=0.0) or 1.0
    count = min(_LINES, len(line.ranks))
    shown = [line.ranks[i * (len(line.ranks) - 1) // max(1, count - 1)] for i in range(count)]
    key = [f'<text x="{_LEFT}" y="{top - 5:.1f}" font-size="11" {_MUTED}>live {escape(unit)}:']
    for i, rank in enumerate(shown):
        colour = f"hsl({(212 + 300 * i // max(1, count)) % 360} 60% 50%)"
        key.append(
            f'<tspan dx="7" fill="{colour}" fill-opacity="1">rank {rank} to {peaks[rank]:,.4g}</tspan>'
        )
        yield (
            f'<path fill="none" stroke="{colour}" stroke-width="1.2" '
            f'd="{_steps(live[rank], scale, top, highest)}"><title>rank {rank}</title></path>'
        )
    yield "".join(key) + "</text>"
    yield f'<path d="M{_LEFT} {top + _STRIP}H{_WIDTH - _RIGHT}" {_LINE}/>'
    for value, y in ((highest, top + 8), (0, top + _STRIP)):
        where = f'x="{_LEFT - 8}" y="{y}" text-anchor="end"'
        yield f'<text {where} font-size="11" {_MUTED}>{value:,.4g}</text>'


def _steps(levels: Sequence[Level], scale: _Scale, top: float, highest: float) -> str:
    path = [f"M{_LEFT} {top + _STRIP:.1f}"]
    for time, value in dict(levels).items():  # the last one of a moment
        path.append(f"H{scale.x(time):.1f}V{top + _STRIP * (1 - value / highest):.1f}")
    return "".join(path)
