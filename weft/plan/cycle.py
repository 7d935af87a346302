"""A deadlock of a schedule in words and as a picture.

A cycle is a round of waits: each rank stands at a WAIT whose transfer another launches, or at something that
another does with it, only after that at which this other rank stands itself; the last waits for the first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from weft.plan.schedule import Action, Schedule

_MARGIN, _LANE, _HIGH, _LETTER, _GAP = 24, 108, 30, 7.4, 10  # pixels; of a letter, the width
_LABEL = 64  # left of the boxes of a lane
_APART = 12  # of red and grey from the middle of a box
_AROUND = 2  # actions shown on each side of those of the cycle


class Place(NamedTuple):
    """An action of a list, and where it stands, from 0."""

    rank: int
    at: int
    action: Action

    def __str__(self) -> str:
        return f"{self.action} (at {self.at})"


class Stuck(NamedTuple):
    """A WAIT and the POST of another rank that it needs; or what both do together, on one and the other."""

    wait: Place
    post: Place


Cycle = tuple[Stuck, ...]


def words(cycle: Cycle) -> str:
    """One line for each wait of the round."""
    lines: list[str] = []
    for stuck, after in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True):
        then = str(after.wait) if after is not cycle[0] else f"{after.wait}, the first of these"
        lines.append(f"rank {stuck.wait.rank} {stuck.wait} waits for rank {stuck.post.rank} {stuck.post},")
        lines.append(f"    which comes after {then}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Box:
    """Where an action of a lane is drawn: left edge, top, width."""

    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def svg(schedule: Schedule, cycle: Cycle) -> str:
    """SVG text: a lane for each rank of the cycle, its actions around there, and arrows from wait to post.

    Red arrows go from a WAIT to the POST that it needs, grey ones over a list from its WAIT to the POST that
    comes only after it. Against the grey arrows and along the red ones one comes back to where one started.
    """
    boxes: dict[tuple[int, int], _Box] = {}
    parts: list[str] = []
    ends = {(place.rank, place.at): place.action.op for stuck in cycle for place in stuck}
    right = 0.0
    for line, stuck in enumerate(cycle):
        rank, y = stuck.wait.rank, 2.5 * _MARGIN + line * _LANE + _HIGH
        x = float(_MARGIN + _LABEL)
        parts.append(_text(_MARGIN, y + 20, f"rank {rank}", "#222", anchor="start", weight="bold"))
        for at in _shown(schedule.lists[rank], [at for where, at in ends if where == rank]):
            if at < 0:
                parts.append(_text(x + 30, y + 20, f"{-at} more", "#888"))
                x += 60 + _GAP
                continue
            words = str(schedule.lists[rank][at])
            box = boxes[rank, at] = _Box(x, y, len(words) * _LETTER + 16)
            parts += _draw(box, words, at, ends.get((rank, at)))
            x += box.width + _GAP
        right = max(right, x)
    wrap = right + 18
    arrows = [*_arrows(cycle, boxes, wrap)]
    high = 2.5 * _MARGIN + len(cycle) * _LANE + _MARGIN / 2
    title = f"Ranks {', '.join(str(stuck.wait.rank) for stuck in cycle)} wait for each other"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(wrap + _MARGIN, 560):.0f} {high:.0f}" '
        'font-family="ui-monospace, monospace" font-size="12">',
        f"<title>{title}</title>",
        "<defs>" + _head("needs", "#c62828") + _head("after", "#777") + "</defs>",
        '<rect width="100%" height="100%" fill="white"/>',
        _text(_MARGIN, 28, f"{title} (red: needs; grey: comes only after)", "#222", anchor="start"),
    ]
    return "\n".join([*head, *parts, *arrows, "</svg>", ""])


def _shown(actions: Sequence[Action], ends: Sequence[int]) -> Iterator[int]:
    """Places near the ends in order; in between, minus the number of actions left out."""
    near = {at + step for at in ends for step in range(-_AROUND, _AROUND + 1)}
    last = -1
    for at in [*sorted(near & set(range(len(actions)))), len(actions)]:
        if at == last + 2:
            yield last + 1
        elif at > last + 2:
            yield last + 1 - at
        if at < len(actions):
            yield at
        last = at


def _draw(box: _Box, words: str, at: int, op: str | None) -> Iterator[str]:
    fill, edge = {"WAIT": ("#fde0dc", "#c62828"), "POST": ("#dcedc8", "#33691e")}.get(
        op or "", ("#f4f4f4", "#bbb")
    )
    yield (
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{_HIGH}" rx="4" '
        f'fill="{fill}" stroke="{edge}"><title>at {at}</title></rect>'
    )
    yield _text(box.middle, box.y + 20, words, "#222" if op else "#777")


def _arrows(cycle: Cycle, boxes: dict[tuple[int, int], _Box], wrap: float) -> Iterator[str]:
    """From each WAIT to the POST that it needs; over each list from its WAIT to the POST after it."""
    for stuck, before in zip(cycle, (cycle[-1], *cycle[:-1]), strict=True):
        wait, post, held = (boxes[place[:2]] for place in (*stuck, before.post))
        start, end = wait.middle + _APART, post.middle + _APART
        if post.y > wait.y:
            path = f"M{start:.1f} {wait.y + _HIGH} L{end:.1f} {post.y - 2}"
        elif len(cycle) == 2:
            path = f"M{start:.1f} {wait.y} L{end:.1f} {post.y + _HIGH + 2}"
        else:  # around the lanes between
            down, up = wait.y + _HIGH + 20, post.y - 32
            path = f"M{start:.1f} {wait.y + _HIGH} V{down} H{wrap:.1f} V{up} H{end:.1f} V{post.y - 2}"
        yield _path(path, "#c62828", "needs")
        path = (
            f"M{wait.middle - _APART:.1f} {wait.y} V{wait.y - 16} H{held.middle - _APART:.1f} V{held.y - 2}"
        )
        yield _path(path, "#777", "after", ' stroke-dasharray="4 3"')


def _path(path: str, colour: str, head: str, more: str = "") -> str:
    style = f'fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#{head})"'
    return f'<path d="{path}" {style}{more}/>'


def _head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{colour}"/></marker>'
    )


def _text(
    x: float, y: float, words: str, colour: str, *, anchor: str = "middle", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{escape(words)}</text>'
    )
