"""From encoders to the decoder: who encodes what of a group of microbatches, and which rows go where.

Everything follows from lengths, which all ranks know before a step: the tokens of each sample, and the items
in them with their sizes. Rows of the decoder that an item fills are counted through all items of a
microbatch; so the order of samples and the loss do not depend on who encodes what.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

import numpy as np
from jaxtyping import Int64

from weft.plan.assign import assign
from weft.plan.items import Item, Piece, Pieces, Placed, Size
from weft.plan.layout import Plan
from weft.plan.plans import Plans
from weft.plan.route import End, Route, compile_route, transpose
from weft.plan.runs import Run
from weft.plan.shard import share
from weft.spec.encoder import EncoderConfig

Integers = Int64[np.ndarray, "..."]


@dataclass(frozen=True)
class Table:
    """What all ranks know of a microbatch.

    Attributes:
        sizes: tokens of each sample, of all readers in order.
        items: in the order of their tokens, which are counted through all samples.
    """

    sizes: tuple[int, ...]
    items: tuple[Placed, ...] = ()

    def of(self, encoder: str) -> tuple[Placed, ...]:
        """The items of one encoder."""
        return tuple(placed for placed in self.items if placed.item.encoder == encoder)


@dataclass(frozen=True)
class Tokens:
    """Tokens of the residual stream that one rank has.

    Attributes:
        rank: of the world.
        feature: which part of the features, where they are cut.
        tokens: counted through all samples.
    """

    rank: int
    feature: int
    tokens: range


def residual(plan: Plan, position: int, sizes: Sequence[int]) -> Iterator[Tokens]:
    """The tokens of every rank of a pipeline rank, for samples of these sizes."""
    layout = plan.at(position).dense
    ends = list(accumulate(sizes, initial=0))
    for rank in layout.holders((position,), tuple(range(layout.places))):
        own = share(len(sizes), layout.readers, layout.grid.index(rank, "dp"))
        counts, part = layout.tokens(ends[own.stop] - ends[own.start]), layout.grid.index(rank, "cp")
        rows = layout.plane.residual_rows(counts[part], layout.place(rank))
        first = ends[own.start] + sum(counts[:part]) + rows.start
        yield Tokens(rank, layout.place(rank) % layout.plane.tp_embed, range(first, first + len(rows)))


@dataclass(frozen=True)
class Sequences:
    """Sequences of a group of microbatches, in order; all but ``items`` have an entry for each.

    Attributes:
        items: of the group, in order.
        item: number of its item.
        inside: its number in the item.
        microbatch: its microbatch in the group.
        first: row of the microbatch's outputs that its first one is.
        sizes: of each.
        rows: of each.
        outputs: rows of the decoder that each gives.
    """

    items: tuple[Item, ...]
    item: tuple[int, ...]
    inside: tuple[int, ...]
    microbatch: Integers
    first: Integers
    sizes: tuple[Size, ...]
    rows: tuple[int, ...]
    outputs: Integers


def sequences(config: EncoderConfig, encoder: str, tables: Sequence[Table]) -> Sequences:
    """What an encoder reads of these microbatches."""
    items: list[Item] = []
    item: list[int] = []
    inside: list[int] = []
    microbatch: list[int] = []
    first: list[int] = []
    total: list[int] = []
    for index, table in enumerate(tables):
        at = 0
        for placed in table.of(encoder):
            outputs = _outputs(config, placed.item)
            total += outputs
            starts = list(accumulate(outputs, initial=at))
            item += [len(items)] * len(outputs)
            inside += range(len(outputs))
            microbatch += [index] * len(outputs)
            first += starts[:-1]
            items.append(placed.item)
            at += placed.item.rows
    sizes = tuple(size for one in items for size in one.sizes)
    return Sequences(
        tuple(items),
        tuple(item),
        tuple(inside),
        np.array(microbatch, np.int64),
        np.array(first, np.int64),
        sizes,
        tuple(config.rows(size) for size in sizes),
        np.array(total, np.int64),
    )


def _outputs(config: EncoderConfig, item: Item) -> list[int]:
    """Rows that each sequence of an item gives; where rows are dropped of all together, all by the first."""
    if config.together:
        return [item.rows] + [0] * (len(item.sizes) - 1)
    return [config.outputs(size) for size in item.sizes]


class Group:
    """What the ranks of an encoder do for a group of microbatches.

    Args:
        plans: of all modules.
        name: the encoder.
        config: what it is.
        tables: of the microbatches of the group.
    """

    def __init__(self, plans: Plans, name: str, config: EncoderConfig, tables: Sequence[Table]) -> None:
        self.plans, self.name, self.config, self.tables = plans, name, config, tuple(tables)
        self.layout = plans.all[name].dense
        self.sequences = sequences(config, name, tables)
        self._last = self.layout.grid.size("pp") - 1
        self._route = cache(self._compile)
        self._residual = cache(self._tokens)
        self._places = cache(self._find)

    @cached_property
    def bins(self) -> tuple[tuple[Piece, ...], ...]:
        """Pieces of each of the encoder's dp x cp bins."""
        found = self.sequences
        grid, cp = self.layout.grid, self.layout.grid.size("cp")
        return assign(
            [self.config.flops(rows) for rows in found.rows],
            grid.size("dp", "cp"),
            rows=found.rows,
            near=self._near,
            cp=cp,
            grain=self.config.grain,
            skip=self.config.skip,
            together=found.item if self.config.together else None,
        )

    @cached_property
    def _near(self) -> list[int]:
        """For each sequence, the bin on the first rank that reads its item; -1 where there is none."""
        grid = self.layout.grid
        bins = {rank: grid.index(rank, "dp", "cp") for rank in grid.ranks}
        found: list[int] = []
        for index, table in enumerate(self.tables):
            ranks = self._residual(index)
            starts = np.array([each.tokens.start for each in ranks], np.int64)
            order = np.argsort(starts, kind="stable")
            for placed in table.of(self.name):
                at = int(np.searchsorted(starts[order], placed.places[0].start, "right")) - 1
                found += [bins.get(ranks[int(order[at])].rank, -1)] * len(placed.item.sizes)
        return found

    def _tokens(self, microbatch: int) -> tuple[Tokens, ...]:
        """What each rank of the decoder's first stage has of a microbatch."""
        return tuple(residual(self.plans.decoder, 0, self.tables[microbatch].sizes))

    def pieces(self, rank: int) -> Pieces:
        """What a rank's bin computes together with those that share sequences with it."""
        cp, grid = self.layout.grid.size("cp"), self.layout.grid
        first = grid.index(rank, "dp") * cp
        return Pieces(self.sequences.sizes, self.bins[first : first + cp], grid.index(rank, "cp"))

    def prepare(self) -> None:
        """Compile every route now, so that nobody waits for it later."""
        for microbatch in range(len(self.tables)):
            transpose(self.route(microbatch))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to encode on any rank."""
        return not self.sequences.sizes

    def _runs(self) -> tuple[Integers, Integers, Integers, Integers, Integers]:
        """Of each run of outputs: bin, microbatch, first row in it, place among the bin's outputs, length."""
        found, config = self.sequences, self.config
        pieces = np.array([(b, *p) for b, own in enumerate(self.bins) for p in own], np.int64).reshape(-1, 5)
        bins, sequence, start, stop, _ = pieces.T
        start = np.maximum(start - config.skip, 0) // config.grain
        length = np.maximum(stop - config.skip, 0) // config.grain - start
        if config.together:  # sequences are whole then
            length = found.outputs[sequence]
        ends = np.cumsum(length)
        before = np.concatenate([[0], ends])[np.searchsorted(bins, bins)]  # outputs of the bins before
        return bins, found.microbatch[sequence], found.first[sequence] + start, ends - length - before, length

    @cached_property
    def _held(self) -> tuple[Integers, Integers, Integers, Integers]:
        """Of each run of outputs: rank, microbatch, first row in it, length; in the order of the rank."""
        bins, microbatch, first, place, length = self._runs()
        tp, columns = self.layout.places, list[tuple[Integers, ...]]()
        totals = np.bincount(bins, length, self.layout.grid.size("dp", "cp")).astype(np.int64)
        for rank in self.layout.holders((self._last,), tuple(range(tp))):
            own = self.layout.grid.index(rank, "dp", "cp")
            rows = share(int(totals[own]), tp, self.layout.place(rank))
            mine = slice(*np.searchsorted(bins, [own, own + 1]))
            low = np.maximum(place[mine], rows.start)
            high = np.minimum(place[mine] + length[mine], rows.stop)
            keep = high > low
            moved = first[mine] + low - place[mine]
            columns.append(
                (np.full(int(keep.sum()), rank), microbatch[mine][keep], moved[keep], (high - low)[keep])
            )
        joined = [np.concatenate(parts).astype(np.int64) for parts in zip(*columns, strict=True)]
        return joined[0], joined[1], joined[2], joined[3]

    def outputs(self, rank: int) -> tuple[int, ...]:
        """Rows for each microbatch that a rank of the last stage makes, in this order."""
        ranks, microbatch, _, length = self._held
        mine = ranks == rank
        return tuple(np.bincount(microbatch[mine], length[mine], len(self.tables)).astype(np.int64).tolist())

    @cached_property
    def feature_parts(self) -> int:
        """Into how many parts the decoder cuts features; a source sends all its rows' first parts first."""
        return self.plans.decoder.at(0).dense.plane.tp_embed

    def route(self, microbatch: int) -> Route:
        """Rows of a microbatch of the group, from the encoder's last stage to the decoder's first."""
        return self._route(microbatch)

    def _compile(self, microbatch: int) -> Route:
        ranks, _, first, length = (column[self._held[1] == microbatch] for column in self._held)
        total = sum(placed.item.rows for placed in self.tables[microbatch].of(self.name))
        parts = self.feature_parts
        columns = [(ranks, first + part * total, length) for part in range(parts)]
        everyone = np.array(self.layout.holders((self._last,), tuple(range(self.layout.places))), np.int64)
        none = np.zeros_like(everyone)
        columns.append((everyone, none, none))
        rank, start, rows = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        return compile_route(End.of(rank, start, rows), self._target(microbatch, total))

    def _target(self, microbatch: int, total: int) -> End:
        places = self._places(microbatch)
        columns: list[tuple[Integers, Integers, Integers]] = []
        for each in self._residual(microbatch):
            rows, _, length = _meet(places, each.tokens)
            none = np.zeros(1, np.int64)
            columns.append((none + each.rank, none, none))
            columns.append((np.full(len(rows), each.rank), rows + each.feature * total, length))
        rank, start, length = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        return End.of(rank, start, length)

    def _find(self, microbatch: int) -> Integers:
        """First token, first row and length of each run of tokens that items take, ascending."""
        found: list[tuple[int, int, int]] = []
        at = 0
        for placed in self.tables[microbatch].of(self.name):
            for run in placed.places:
                found.append((run.start, at, run.length))
                at += run.length
        return np.array(found, np.int64).reshape(-1, 3)

    def wanted(self, rank: int, microbatch: int) -> tuple[Run, ...]:
        """Rows of a rank's residual stream into which rows of this encoder come, in their order."""
        tokens = next(each.tokens for each in self._residual(microbatch) if each.rank == rank)
        _, here, length = _meet(self._places(microbatch), tokens)
        return tuple(map(Run, here.tolist(), length.tolist()))


def _meet(places: Integers, tokens: range) -> tuple[Integers, Integers, Integers]:
    """Of runs of tokens, what lies in ``tokens``: rows of the items, places in ``tokens``, lengths."""
    first, last = np.searchsorted(places[:, 0] + places[:, 2], tokens.start, "right"), len(places)
    last = int(np.searchsorted(places[:, 0], tokens.stop, "left"))
    token, row, length = places[int(first) : max(last, int(first))].T
    start = np.maximum(token, tokens.start)
    stop = np.minimum(token + length, tokens.stop)
    return row + start - token, start - tokens.start, stop - start
