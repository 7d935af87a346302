"""Where two plans part: the first unit, tensor and rank whose values differ, in order of execution."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from weft.train.trace import CHOICES, Name, Piece, Trace

LIMITS = {"fp64": 1e-10, "fp32": 1e-5}  # of the largest difference to the largest value of a tensor
ROUNDING = {"fp64": 10 * 2.0**-52, "fp32": 10 * 2.0**-23}  # of the largest value of a phase: no difference
ALIKE = 1e-2  # of the largest difference: where the same fault shows
SUMMED = ("losses", "backward", "gradients")  # ranks that have the same element have summands of it
REVERSED = ("backward", "gradients")


@dataclass(frozen=True)
class Tally:
    """How far one tensor lies apart under two plans.

    Attributes:
        phase: the field of ``Trace``.
        unit: such as ``layers.3``.
        tensor: inside the unit, such as ``mixer.in_proj``.
        difference: largest absolute difference over the largest absolute value under plan A; of router
            choices the share that differs.
        differs: whether that is more than rounding.
    """

    phase: str
    unit: str
    tensor: str
    difference: float
    differs: bool


@dataclass(frozen=True)
class Fault:
    """The first tensor that differs.

    Attributes:
        at: the tensor.
        row: of the largest difference: a token of the global batch, or a row of a parameter.
        column: its feature, or the column of a parameter (dimensions after the first are one).
        values: there, under each plan.
        ranks: that have it, under each plan; of copies the one that is farthest off.
        box: first and last row, first and last column that plan B's rank has.
        spread: all of plan B's ranks whose part is off by about as much; a sum over ranks spreads what one
            of them does wrong to the others.
        before: the tensor compared before this one, which agrees.
        unseen: tensors of the same unit that only one of the plans has.
    """

    at: Tally
    row: int
    column: int
    values: tuple[float, float]
    ranks: tuple[tuple[int, ...], tuple[int, ...]]
    box: tuple[int, int, int, int]
    spread: tuple[int, ...]
    before: Tally | None
    unseen: tuple[Name, ...]


def bisect(a: Trace, b: Trace, precision: str) -> tuple[list[Tally], Fault | None]:
    """Compare phase by phase in order of execution: the backward pass from the last unit to the first.

    The first phase with a difference is the last one compared, because the later ones follow from it.
    """
    tallies: list[Tally] = []
    for phase in (f.name for f in fields(Trace)):
        left, right = getattr(a, phase), getattr(b, phase)
        names = list(dict.fromkeys([*max(left, right, key=len), *left, *right]))
        names = names[::-1] if phase in REVERSED else names
        shared = [name for name in names if name in left and name in right]
        largest = max((_size(left[name]) for name in shared if name[1] != CHOICES), default=0.0)
        found = [_tally(phase, name, left[name], right[name], precision, largest) for name in shared]
        first = next((i for i, tally in enumerate(found) if tally.differs), None)
        tallies += found
        if first is not None:
            name, before = shared[first], found[first - 1] if first else None
            unseen = tuple(other for other in names if other[0] == name[0] and other not in shared)
            return tallies, _fault(found[first], left[name], right[name], before, unseen)
    return tallies, None


def _size(pieces: Sequence[Piece]) -> float:
    return max((float(p.value.abs().max()) for p in pieces if p.value.numel()), default=0.0)


def _wholes(
    phase: str, a: Sequence[Piece], b: Sequence[Piece]
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Both global matrices. Copies of an element are averaged, so one that is wrong shows; none is NaN."""
    full = [p for p in (*a, *b) if p.value.numel()]
    shape = [max((int(index.max()) + 1 for index in axis), default=0) for axis in _axes(full)]
    wholes: list[Tensor] = []
    for pieces in (a, b):
        total, copies = torch.zeros(2, *shape, dtype=torch.float64)
        for p in pieces:
            at = p.rows[:, None], p.columns
            total[at] += p.value
            copies[at] += 1
        wholes.append(total if phase in SUMMED else total / copies)
    return wholes[0], wholes[1]


def _axes(pieces: Sequence[Piece]) -> tuple[list[Tensor], list[Tensor]]:
    return [p.rows for p in pieces], [p.columns for p in pieces]


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Absolute differences; what is not a number differs without limit."""
    return (a - b).abs().nan_to_num(nan=torch.inf)


def _tally(
    phase: str, name: Name, a: Sequence[Piece], b: Sequence[Piece], precision: str, largest: float
) -> Tally:
    left, right = _wholes(phase, a, b)
    apart = _apart(left, right)
    if name[1] == CHOICES:
        share = float((apart != 0).double().mean())
        return Tally(phase, *name, share, share > 0)
    error, scale = (float(m.max()) if m.numel() else 0.0 for m in (apart, left.abs()))
    difference = error / scale if scale else (torch.inf if error else 0.0)
    rounding = difference <= LIMITS[precision] or error <= ROUNDING[precision] * largest
    return Tally(phase, *name, difference, not rounding)


def _fault(
    at: Tally, a: Sequence[Piece], b: Sequence[Piece], before: Tally | None, unseen: tuple[Name, ...]
) -> Fault:
    left, right = _wholes(at.phase, a, b)
    apart = _apart(left, right)
    row, column = divmod(int(apart.argmax()), left.shape[1])
    here = float(left[row, column]), float(right[row, column])
    found: list[list[Piece]] = []
    for pieces, other in ((a, here[1]), (b, here[0])):
        holders = [p for p in pieces if row in p.rows and column in p.columns]
        if at.phase not in SUMMED:
            holders = sorted(holders, key=lambda p: -abs(_element(p, row, column) - other))[:1]
        found.append(holders)
    box = (0, 0, 0, 0)
    if found[1]:
        rows, columns = found[1][0].rows, found[1][0].columns
        box = (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max()))
    ranks = tuple(tuple(p.rank for p in holders) for holders in found)
    large = apart >= ALIKE * apart.max()
    spread = tuple(p.rank for p in b if bool(large[p.rows[:, None], p.columns].any()))
    return Fault(at, row, column, here, (ranks[0], ranks[1]), box, spread, before, unseen)


def _element(piece: Piece, row: int, column: int) -> float:
    at = (piece.rows == row).nonzero()[0, 0], (piece.columns == column).nonzero()[0, 0]
    return float(piece.value[at])
