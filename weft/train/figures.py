"""Pictures of a run as SVG in the style sheet's colours, so that they follow light and dark."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from weft.train.record import Series
from weft.train.units import short

_NAMES = ("ink", "muted", "grid", "card", "a", "b", "c", "d", "e")
# Colours that matplotlib writes, each replaced in the SVG by the variable of its name.
_COLORS = {name: f"#01{i:02x}01" for i, name in enumerate(_NAMES)}
_INK, _MUTED, _GRID, _CARD, *_CYCLE = _COLORS.values()
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)))
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 8.5, "svg.fonttype": "none", "text.parse_math": False,
    "text.color": _INK, "axes.edgecolor": _GRID, "axes.labelcolor": _MUTED, "axes.linewidth": 0.8,
    "axes.titlelocation": "left", "axes.titlesize": 8.5, "axes.titlecolor": _MUTED, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": _GRID, "grid.linewidth": 0.6, "ytick.left": False, "xtick.color": _GRID,
    "ytick.color": _GRID, "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED,
}  # fmt: skip
_MAP_STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.spines.top": True,
    "axes.spines.right": True,
    "axes.titlecolor": _INK,
}
_ROUND = [1, 2, 2.5, 5, 10]
_RANGE = 2.0  # expert loads are coloured from 1/4 to 4 times an even share
_COLUMNS = 160  # of an expert map
BINS = 800  # points of a curve; more are joined

Paint = Callable[[Figure], None]


class Label(NamedTuple):
    """A name at the right end of a line."""

    value: float
    text: str
    color: str


def draw(paint: Paint, width: float, height: float, name: str) -> str:
    """One SVG element of ``width`` by ``height`` inches; ``name`` is read out and makes its ids unique."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure((width, height), layout="constrained", facecolor="none")
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<(?:g|image)\b[^>]*?) id="[^"]*"', r"\1", svg)  # only other ids are referred to
    head = rf'<svg viewBox="\1" role="img" aria-label="{name}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, svg)
    svg = re.sub(r"font: ([\d. a-z]*?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for variable, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def bin_size(points: int, limit: int = BINS) -> int:
    """How many neighbours are joined so that at most ``limit`` points are left."""
    return max(1, -(-points // limit))


def window_of(points: int) -> int:
    """Points that the smoothed line looks at: a fortieth of the run, odd; 1 shows the values themselves."""
    return points // 40 | 1


def reading(points: int) -> str:
    """How a smoothed curve of so many points is to be read."""
    size = bin_size(points)
    window = window_of(-(-points // size)) * size
    thin = f"band: range within {size} steps" if size > 1 else "thin line: every step"
    return f"Thick line: running median over {window} steps; {thin}." if window > 1 else ""


def binned(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, least and greatest value of each group of ``bin_size`` rows; NaN where none is finite."""
    starts = np.arange(0, len(series.steps), bin_size(len(series.steps)))
    good = np.isfinite(series.values)
    count = np.add.reduceat(good.astype(int), starts)
    total = np.add.reduceat(np.where(good, series.values, 0.0), starts)
    low = np.minimum.reduceat(np.where(good, series.values, np.inf), starts)
    high = np.maximum.reduceat(np.where(good, series.values, -np.inf), starts)
    mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
    steps = np.add.reduceat(series.steps, starts) / np.diff(np.append(starts, len(series.steps)))
    return steps, mean, np.where(count > 0, low, np.nan), np.where(count > 0, high, np.nan)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running median over ``window_of`` points: those that exist at the ends and between NaNs.

    A median, because one spike must not become a plateau as wide as the window.
    """
    window = window_of(len(values))
    around = np.pad(values, window // 2, constant_values=np.nan)
    views = np.lib.stride_tricks.sliding_window_view(around, window)
    known = np.isfinite(views).any(axis=1)
    line = np.full(len(values), np.nan)
    line[known] = np.nanmedian(views[known], axis=1)
    return line


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Sorted places of 0 to 1 moved as little as possible (least squares) until neighbours are ``gap`` apart.

    Bounded isotonic regression of ``wanted[i] - i * gap``: adjacent violators are pooled, then clipped.
    """
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(wanted):
        mean, count = place - i * gap, 1
        while pools and pools[-1][0] > mean:
            last, size = pools.pop()
            mean, count = (mean * count + last * size) / (count + size), count + size
        pools.append((mean, count))
    room = max(0.0, 1.0 - (len(wanted) - 1) * gap)
    flat = [min(max(mean, 0.0), room) for mean, count in pools for _ in range(count)]
    return [place + i * gap for i, place in enumerate(flat)]


def tick(value: float, whole: float = 1e3) -> str:
    """A number on an axis: ``0.001``, ``250``, ``25k``; below ``whole`` all digits are shown."""
    if abs(value) < whole:
        return f"{value:,.10g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.3g}"
    text = short(value)
    return text[:-1].rstrip("0").rstrip(".") + text[-1] if "." in text else text


def lines(
    series: dict[str, Series],
    unit: str,
    *,
    zero: bool = False,
    scale: Literal["linear", "log", "percent"] = "linear",
    exact: bool = False,
    limit: tuple[float, str] | None = None,
) -> Paint:
    """One curve per name, smoothed unless ``exact``; more than five are thin and have no names.

    ``zero`` starts the axis at 0; ``limit`` is the height and name of a dashed horizontal line.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        form = (lambda v, _: f"{tick(100 * v)}%") if scale == "percent" else (lambda v, _: tick(v))
        if scale == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(form))
        many = len(series) > len(_CYCLE)
        labels = []
        for i, (name, one) in enumerate(series.items()):
            label = Label(0, "" if many else name, _CYCLE[0 if many else i])
            labels.append(_curve(axes, one, label, _DASHES[0 if many else i], exact, thin=many))
        _dress(axes, list(series.values()), unit, zero)
        _end_labels(axes, labels + ([_level(axes, Label(*limit, _MUTED))] if limit else []), gap=0.1)

    return paint


def loss_top(train: Series, valid: Series, baselines: dict[str, float]) -> float:
    """Upper end of the loss axis: neither a spike nor a start far above all baselines flattens the rest."""
    rest = [*valid.finite, *baselines.values()]
    start = [] if baselines else [float(np.nanmax(smooth(binned(train)[1])))]
    return 1.08 * max([*rest, *start])


def loss_chart(
    train: Series, valid: Series, baselines: dict[str, float], unit: str, bad: Sequence[int]
) -> Paint:
    """The main picture: training and validation loss, and baselines as dashed lines, all in one unit."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        labels = [_level(axes, Label(value, name, _MUTED)) for name, value in baselines.items()]
        labels.append(_curve(axes, train, Label(0, "training", _CYCLE[0])))
        if valid:
            size = 5 if len(valid.steps) <= 40 else 3
            edge = {"markeredgecolor": _CARD, "markeredgewidth": 0.6}
            axes.plot(valid.steps, valid.values, "o-", color=_CYCLE[1], lw=1, ms=size, zorder=4, **edge)
            labels.append(Label(float(valid.finite[-1]), "validation", _CYCLE[1]))
        _dress(axes, [s for s in (train, valid) if s], unit)
        axes.set_ylim(axes.get_ylim()[0], loss_top(train, valid, baselines))
        _mark(axes, bad, "not finite")
        named = [label._replace(text=f"{label.text} {label.value:.3f}") for label in labels]
        _end_labels(axes, named, gap=0.058)

    return paint


def heat_maps(loads: dict[str, tuple[np.ndarray, np.ndarray]], columns: int) -> Paint:
    """Expert load over time, one map per MoE layer: steps across, experts down, an even load is blank."""

    def paint(figure: Figure) -> None:
        with matplotlib.rc_context(_MAP_STYLE):
            grid = figure.subplots(-(-len(loads) // columns), columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(loads) :]:
            axes.set_visible(False)
        for axes, (unit, (steps, load)) in zip(grid.flat, loads.items(), strict=False):
            extent = (float(steps[0]) - 0.5, float(steps[-1]) + 0.5, load.shape[1] - 0.5, -0.5)
            axes.imshow(load_colors(load), aspect="auto", interpolation="none", extent=extent)
            axes.set_title(unit)
            axes.set_yticks([0, load.shape[1] - 1])
            _step_axis(axes, 4, "")
        for axes in grid[:, 0]:
            axes.set_ylabel("expert")
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step")

    return paint


def load_colors(load: np.ndarray) -> np.ndarray:
    """``load[rows, experts]`` relative to an even share as RGBA ``[experts, columns, 4]``, rows joined.

    The opacity grows with |log2 load|: even is clear on light and on dark, less is blue, more is orange.
    """
    starts = np.arange(0, len(load), bin_size(len(load), _COLUMNS))
    mean = np.add.reduceat(load, starts) / np.diff(np.append(starts, len(load)))[:, None]
    level = np.clip(np.log2(np.maximum(mean, 1e-9)) / _RANGE, -1.0, 1.0).T
    color = np.where(level[..., None] < 0, (0.13, 0.42, 0.75), (0.90, 0.45, 0.05))
    return np.concatenate([color, np.abs(level)[..., None]], axis=-1)


def load_key(figure: Figure) -> None:
    """The colours of the expert maps."""
    with matplotlib.rc_context(_MAP_STYLE):
        axes = figure.subplots()
    image = load_colors(2.0 ** np.linspace(-_RANGE, _RANGE, _COLUMNS)[:, None])
    axes.imshow(image, aspect="auto", interpolation="none", extent=(-2, 2, 0, 1))
    axes.set_xticks([-2, -1, 0, 1, 2], ["¼ or less", "½", "even share", "2×", "4× or more"])
    axes.set_yticks([])


def _curve(
    axes: Axes, series: Series, label: Label, dash: Any = "-", exact: bool = False, thin: bool = False
) -> Label:
    """A noisy curve is its running median over faint single values (or the range of joined ones)."""
    steps, mean, low, high = binned(series)
    line = mean if exact else smooth(mean)
    if not exact and not thin:
        if bin_size(len(series.steps)) > 1:
            axes.fill_between(steps, low, high, color=label.color, alpha=0.22, lw=0)
        axes.plot(steps, mean, color=label.color, alpha=0.32, lw=0.7)
    look: dict[str, Any] = {"lw": 0.7, "alpha": 0.4} if thin else {"lw": 1.7, "ls": dash}
    axes.plot(steps, line, color=label.color, marker="o" if len(series.finite) < 2 else "", ms=4, **look)
    known = line[np.isfinite(line)]
    return label._replace(value=float(known[-1]) if len(known) else float("nan"))


def _level(axes: Axes, label: Label) -> Label:
    axes.axhline(label.value, color=label.color, lw=0.9, ls=(0, (4, 3)))
    return label


def _dress(axes: Axes, series: Sequence[Series], unit: str, zero: bool = False) -> None:
    """Axes with units: steps below, ``unit`` above the left end of the value axis."""
    steps = np.concatenate([s.steps for s in series])
    first, last = float(steps.min()), float(steps.max())
    axes.set_xlim(first if first > 20 else 0.0, last if last > first else last + 1)
    _step_axis(axes, 6, "optimizer step")
    axes.set_title(unit)
    whole = all(np.all(s.finite % 1 == 0) for s in series)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND, integer=whole))
    if zero:
        high = max(1.08 * max(s.finite.max() for s in series), 1.08 if whole else 1e-12)
        axes.set_ylim(0, max(axes.get_ylim()[1], high))


def _step_axis(axes: Axes, ticks: int, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=_ROUND, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, whole=1e5)))


def _end_labels(axes: Axes, labels: Sequence[Label], gap: float) -> None:
    """Names at the right end of their lines, at least ``gap`` of the height apart."""
    named = sorted(label for label in labels if label.text and np.isfinite(label.value))
    to_axes = axes.transData + axes.transAxes.inverted()
    places = spread([float(to_axes.transform((0, label.value))[1]) for label in named], gap)
    at: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (6, 0), "textcoords": "offset points"}
    for place, label in zip(places, named, strict=True):
        axes.annotate(label.text, (1, place), **at, va="center", color=label.color, annotation_clip=False)


def _mark(axes: Axes, steps: Sequence[int], text: str) -> None:
    """Shade special steps, with a line where a stretch of them starts; the first one is named."""
    for i, step in enumerate(steps):
        axes.axvspan(step - 0.5, step + 0.5, color=_CYCLE[1], alpha=0.15, lw=0)
        if i == 0 or steps[i - 1] != step - 1:
            axes.axvline(step - 0.5, color=_CYCLE[1], lw=0.8)
    if steps:
        at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(text, (steps[0] - 0.5, 1), (-3, 0), **at, ha="right", va="top", color=_CYCLE[1])
