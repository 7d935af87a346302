"""A plan as one SVG: ranks are squares, coloured once by the decoder's grid and once by the experts'."""

import math
from collections.abc import Callable, Iterator

from weft.plan.grid import Grid, divisors
from weft.plan.layout import Plan
from weft.plan.show import axes_words

_GAP, _MARGIN, _HEAD = 0.3, 24, 40  # between planes (in squares); around and above each grid (in pixels)
_NUMBERED = 512  # ranks up to which squares carry their numbers


def svg(plan: Plan) -> str:
    """SVG text. The decoder's planes are blocks; hue is the stage and the reader, or the experts held."""
    grid, plane = plan.dense.grid, plan.dense.plane
    place = _places(grid, plane.tp, plane.tp_embed)
    columns = max(x for x, _ in map(place, range(len(grid.ranks)))) + 1
    lines = max(y for _, y in map(place, range(len(grid.ranks)))) + 1
    side = max(4.0, min(28.0, 1200 / columns))
    width = columns * side + 2 * _MARGIN
    height = lines * side + _HEAD + _MARGIN
    title = f"{plan.world:,} rank{'s' * (plan.world > 1)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 420):.0f} {2 * height:.0f}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{title}: {axes_words(grid)}; experts {axes_words(plan.experts.grid)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    colours = (("decoder", grid, "dp"), ("experts", plan.experts.grid, "ep"))
    for i, (role, shown, axis) in enumerate(colours):
        words = f"{role}: {axes_words(shown)}; hue: {'pp, ' if shown.size('pp') > 1 else ''}{axis}"
        parts.append(f'<g transform="translate({_MARGIN} {i * height + _HEAD:.1f})">')
        parts.append(f'<text x="0" y="-14" fill="#222">{words}</text>')
        parts += _squares(shown, axis, place, side)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _places(grid: Grid, tp: int, tp_embed: int) -> Callable[[int], tuple[float, float]]:
    """Column and line of the i-th rank: planes side by side, each tp_embed wide and tp high, stages below."""
    wide, high = (tp_embed, tp) if tp_embed > 1 else _block(tp)
    plane, pp = tp * tp_embed, grid.size("pp")
    per_stage = len(grid.ranks) // plane // pp
    ideal = max(1, min(per_stage, round(math.sqrt(2 * per_stage * pp * high / wide))))
    full = [n for n in divisors(per_stage) if ideal / 2 <= n <= 2 * ideal]  # lines without a gap at the end
    across = min(full or [ideal], key=lambda n: abs(n - ideal))
    down = -(-per_stage // across)

    def place(i: int) -> tuple[float, float]:
        index, inside = divmod(i, plane)
        stage, index = divmod(index, per_stage)
        line, column = divmod(index, across)
        y, x = divmod(inside, wide)
        return x + column * (wide + _GAP), y + (line + stage * down) * (high + _GAP) + stage * _GAP

    return place


def _block(count: int) -> tuple[int, int]:
    """Width and height of the flattest block of so many squares that is not flatter than four to one."""
    high = max(h for h in range(1, math.isqrt(count) + 1) if count % h == 0)
    return (count, 1) if count <= 4 else (count // high, high)


def _squares(
    grid: Grid, axis: str, place: Callable[[int], tuple[float, float]], side: float
) -> Iterator[str]:
    numbered, size = len(grid.ranks) <= _NUMBERED and side >= 12, grid.size(axis)
    for i, rank in enumerate(grid.ranks):
        at = grid.coordinates(rank)
        x, y = place(i)
        hue = (360 * at[axis] / size + 137.5 * at["pp"]) % 360
        fill = f"hsl({hue:.0f} 60% {72 - 14 * (at['pp'] % 2)}%)"
        words = " ".join(f"{name} {index}" for name, index in at.items() if grid.size(name) > 1)
        yield (
            f'<rect x="{x * side:.1f}" y="{y * side:.1f}" width="{side - 1:.1f}" height="{side - 1:.1f}" '
            f'rx="2" fill="{fill}"><title>rank {rank}{": " * bool(words)}{words}</title></rect>'
        )
        if numbered:
            middle = f'x="{(x + 0.5) * side - 0.5:.1f}" y="{(y + 0.6) * side:.1f}" text-anchor="middle"'
            yield f'<text {middle} font-size="{side * 0.38:.1f}" fill="#222">{rank}</text>'
