"""Flat tensors: where parameters lie in them, what of them is here, and which ranks have the same.

Parameters that are treated alike (weight decay, dtype) rest in one flat tensor. It has a section per unit;
each section is cut evenly over the store group, and what a rank has of all sections, one after another, is
its *shard*: the one tensor that the optimizer sees. With one rank in the group the shard is the whole.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from weft.parallel.comm import Comm
from weft.parallel.mesh import Mesh
from weft.plan.box import Box
from weft.plan.layout import Layout
from weft.spec.param import ParamSpec

ALIGN = 8  # elements: 16 bytes of bf16, what matrix kernels and collectives want of an address


@dataclass(frozen=True)
class Common:
    """A box of a parameter.

    Attributes:
        box: in the global tensor.
        local: in the tensor of this rank.
        ranks: those that have the same elements of it in their shards, ascending.
    """

    box: Box
    local: Box
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where the tensor of a parameter lies in its section; the next slot begins at ``end``."""

    spec: ParamSpec
    shape: tuple[int, ...]
    start: int
    end: int
    boxes: tuple[Common, ...]

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + math.prod(self.shape)

    def spans(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Ranges of the section, and the ranks that have the same elements."""
        if len({common.ranks for common in self.boxes}) == 1:
            yield self.start, self.stop, self.boxes[0].ranks
            return
        for common in self.boxes:
            for first, last in spans(common.local, self.shape):
                yield self.start + first, self.start + last, common.ranks


@dataclass
class Section:
    """The part of a flat tensor that one unit has.

    Attributes:
        slots: places of its parameters.
        params: the parameters, views of ``compute``.
        first: where this rank's part begins in the section.
        width: elements that each rank of the store group has.
        start: where this rank's part begins in the shard.
        compute: the whole section, what layers read; without memory while the unit is freed.
        total: gradients of the whole section as they add up, at levels 0 and 1; empty above.
    """

    slots: tuple[Slot, ...]
    params: list[nn.Parameter]
    first: int
    width: int
    start: int
    compute: Tensor
    total: Tensor

    def part(self, shard: Tensor) -> Tensor:
        """This section's range of a tensor like the shard."""
        return shard[self.start : self.start + self.width]

    def own(self) -> Tensor:
        """This rank's part of what layers read."""
        return self.compute[self.first : self.first + self.width]

    def views(self, whole: Tensor) -> Iterator[Tensor]:
        """Each parameter's part of a tensor like the whole section."""
        for slot in self.slots:
            yield whole[slot.start : slot.stop].view(slot.shape)

    def take_gradients(self, dtype: torch.dtype) -> Tensor:
        """The gradients of the whole section; the parameters have none then."""
        whole = torch.zeros_like(self.compute, dtype=dtype)
        for param, view in zip(self.params, self.views(whole), strict=True):
            if param.grad is not None:
                view.copy_(param.grad)
                param.grad = None
        return whole

    def resize(self, elements: int) -> None:
        """Give ``compute`` memory for so many elements: all or none."""
        self.compute.untyped_storage().resize_(elements * self.compute.itemsize)


@dataclass(frozen=True)
class Run:
    """The elements ``start`` to ``stop - 1`` of a shard, which all of ``ranks`` have."""

    start: int
    stop: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A box of a parameter that this rank's shard has.

    Attributes:
        name: of the parameter.
        tensor: the values, a view of the tensor that was asked about.
        box: in the global tensor.
        shape: of the global tensor.
        owned: whether this is the first of the ranks that have the box; one rank owns each.
    """

    name: str
    tensor: Tensor
    box: Box
    shape: tuple[int, ...]
    owned: bool


@dataclass
class Flat:
    """Parameters that are treated alike.

    Attributes:
        rank: this rank.
        comm: the ranks over which the shard is cut.
        decay: whether weight decay applies.
        sections: one per unit, in the order of the shard.
        shard: what layers read, this rank's part.
        master: what the optimizer writes; the same memory where the dtypes are the same.
        grad: summed gradients of the shard.
    """

    rank: int
    comm: Comm
    decay: bool
    sections: list[Section]
    shard: Tensor
    master: Tensor
    grad: Tensor
    runs: list[Run] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = list(_merged(self._runs()))

    def _runs(self) -> Iterator[Run]:
        for section in self.sections:
            moved = section.start - section.first
            for slot in section.slots:
                for start, stop, ranks in slot.spans():
                    start, stop = max(start, section.first), min(stop, section.first + section.width)
                    if start < stop:
                        yield Run(start + moved, stop + moved, ranks)

    def sum_copies(self, group: Callable[[tuple[int, ...]], Comm]) -> list[Callable[[], None]]:
        """Sum the gradient over the ranks that have the same elements; one collective per set of ranks.

        All are under way; call what is returned, in order, to have the sums.
        """
        sets: dict[tuple[int, ...], list[Tensor]] = {}
        for run in self.runs:
            sets.setdefault(run.ranks, []).append(self.grad[run.start : run.stop])
        return [_summing(group(ranks), parts) for ranks, parts in sets.items() if len(ranks) > 1]

    def square(self) -> Tensor:
        """Sum of the squares of the gradient that this rank counts, as float64."""
        mine = [run for run in self.runs if run.ranks[0] == self.rank]
        parts = [self.grad] if len(mine) == len(self.runs) else [self.grad[r.start : r.stop] for r in mine]
        norms = [torch.linalg.vector_norm(part).double() for part in parts]
        return sum((norm.square() for norm in norms), start=self.grad.new_zeros((), dtype=torch.float64))

    def pieces(self, values: Tensor) -> Iterator[Stored]:
        """The boxes of a tensor like the shard."""
        for section in self.sections:
            for slot in section.slots:
                start = max(slot.start, section.first)
                stop = min(slot.stop, section.first + section.width)
                at = section.start + start - section.first
                for box in boxes(slot.shape, start - slot.start, stop - slot.start):
                    yield from self._stored(slot, box, values[at : at + box.numel].view(box.shape))
                    at += box.numel

    def _stored(self, slot: Slot, box: Box, tensor: Tensor) -> Iterator[Stored]:
        for common in slot.boxes:
            inner = box.overlap(common.local)
            if inner:
                moves = zip(inner.start, common.local.start, common.box.start, strict=True)
                place = Box(tuple(at - local + start for at, local, start in moves), inner.shape)
                owned = common.ranks[0] == self.rank
                yield Stored(slot.spec.name, tensor[inner.within(box)], place, slot.spec.shape, owned)


def _summing(comm: Comm, parts: list[Tensor]) -> Callable[[], None]:
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    pending = comm.start_all_reduce(together)

    def finish() -> None:
        pending.wait()
        if len(parts) > 1:
            for part, total in zip(parts, together.split([len(part) for part in parts]), strict=True):
                part.copy_(total)

    return finish


def _merged(runs: Iterable[Run]) -> Iterator[Run]:
    """Neighbours of the same ranks as one run, with the padding between them (zeros).

    A larger gap stays: there another rank may have a run (of an uneven vocabulary), and all must agree on
    what they sum together.
    """
    last: Run | None = None
    for run in sorted(runs, key=lambda run: run.start):
        if last and last.ranks == run.ranks and run.start - last.stop < ALIGN:
            last = Run(last.start, run.stop, run.ranks)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


def slots(
    specs: Iterable[ParamSpec], mesh: Mesh, ranks: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> tuple[Slot, ...]:
    """Places of parameters, one after another.

    A slot is as large as the largest of any place's tensor, so that a box that several places share lies at
    the same elements on all of them. ``ranks``: what ``copies`` gives for their role, remembered.
    """
    found: list[Slot] = []
    at = 0
    for spec in specs:
        parts = tuple(Common(held.box, held.local, ranks(held.holders)) for held in mesh.held(spec))
        end = aligned(at + mesh.plan.room(spec))
        found.append(Slot(spec, mesh.shape(spec), at, end, parts))
        at = end
    return tuple(found)


def copies(rank: int, layout: Layout, positions: Sequence[int], places: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks of pipeline ranks whose place is in ``places`` and that are where ``rank`` is in the store."""

    def at(other: int) -> int:
        return layout.grid.index(other, *layout.over) % layout.cuts

    return tuple(sorted(other for other in layout.holders(positions, places) if at(other) == at(rank)))


def aligned(length: int) -> int:
    """The next multiple of ALIGN."""
    return -(-length // ALIGN) * ALIGN


def spans(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of the flattened tensor that a box of it fills, ascending."""
    if not box.numel:
        return
    axis = len(shape) - 1
    while axis > 0 and box.shape[axis] == shape[axis]:
        axis -= 1
    length = math.prod(box.shape[axis:])
    inner = math.prod(shape[axis + 1 :])
    starts = [box.start[axis] * inner] if shape else [0]
    stride = inner * shape[axis] if shape else 1
    for outer in reversed(range(axis)):
        rows = range(box.start[outer], box.stop[outer])
        starts = [row * stride + start for row in rows for start in starts]
        stride *= shape[outer]
    for start in starts:
        yield start, start + length


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that a range of the flattened tensor fills, in order: at most ``2 * ndim - 1``."""
    if start >= stop:
        return
    if stop - start == math.prod(shape):
        yield Box.whole(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if start % row:
        yield from _in_row(shape, first - 1, start, min(stop, first * row))
    if first < last:
        rest = shape[1:]
        yield Box((first, *(0 for _ in rest)), (last - first, *rest))
    if stop % row and first <= last:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    origin = row * math.prod(shape[1:])
    for box in boxes(shape[1:], start - origin, stop - origin):
        yield Box((row, *box.start), (1, *box.shape))
