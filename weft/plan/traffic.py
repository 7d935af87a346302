"""Bytes that cross from an encoder to a decoder and back: by leaders, by gathering, and by routes.

The first two are what other systems do, as formulas; the third is counted on a compiled route. All count what
ranks receive in one microbatch of every data-parallel replica of the decoder. B is what one replica consumes:
its rows of encoder output, times their width, times the bytes of an element.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from weft.plan.route import End, Route, compile_route
from weft.plan.runs import Holding, Run, contiguous, count, rows
from weft.plan.table import Table, bytes_words


@dataclass(frozen=True)
class Axes:
    """Ranks of a module along each axis; its grid is ordered pp, dp, cp, tp from outer to inner.

    Attributes:
        tp: tensor parallelism; between layers these ranks share the rows of a sequence, too.
        cp: context parallelism.
        pp: stages of a pipeline.
        dp: replicas.
        first: its first rank.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    first: int = 0

    @property
    def ranks(self) -> range:
        """All of its ranks."""
        return range(self.first, self.first + self.wide * self.pp * self.dp)

    @property
    def wide(self) -> int:
        """Ranks of one stage of one replica."""
        return self.tp * self.cp

    def stage(self, number: int) -> range:
        """The ranks of a stage, of all replicas; -1 is the last."""
        size = self.wide * self.dp
        start = self.first + number % self.pp * size
        return range(start, start + size)

    def __str__(self) -> str:
        return "/".join(str(size) for size in (self.tp, self.cp, self.pp, self.dp))


class Boundary(NamedTuple):
    """An encoder before a decoder.

    Attributes:
        name: for people.
        encoder: its layout.
        decoder: its layout.
        tokens: of the sequence of a decoder replica.
        images: which of these are rows of the encoder.
        row: bytes of one.
    """

    name: str
    encoder: Axes
    decoder: Axes
    tokens: int
    images: Holding
    row: int

    @property
    def size(self) -> int:
        """B."""
        return count(self.images) * self.row


@dataclass(frozen=True)
class Traffic:
    """Bytes received.

    Attributes:
        forward: by all ranks together.
        backward: likewise, of gradients.
        forward_rank: by the rank that receives most.
        backward_rank: likewise, of gradients.
    """

    forward: int
    backward: int
    forward_rank: int
    backward_rank: int


def leader(at: Boundary) -> Traffic | None:
    """One rank of a replica sends all, one receives it and broadcasts it to its stage; gradients go back so.

    Gradients are first summed over the context-parallel ranks at the leader. None where the numbers of
    replicas do not divide one another.
    """
    encoder, decoder, size = at.encoder, at.decoder, at.size
    if encoder.dp % decoder.dp and decoder.dp % encoder.dp:
        return None
    backward = (decoder.cp - 1 + encoder.wide) * size * decoder.dp
    alone = max((decoder.cp - 1) * size, size * decoder.dp // encoder.dp)
    return Traffic(decoder.wide * size * decoder.dp, backward, size, alone)


def gather(at: Boundary) -> Traffic | None:
    """Each rank of a decoder replica gathers what its k encoder replicas have, in every stage.

    Back, each takes its own part of gradients that tensor parallelism has gathered before, which is not
    counted. None unless both have the same ranks and k is a whole number.
    """
    encoder, decoder = at.encoder, at.decoder
    if encoder.ranks != decoder.ranks or encoder.dp % decoder.dp:
        return None
    others = encoder.dp // decoder.dp - 1
    alone = at.size * others // (others + 1)
    return Traffic(len(decoder.ranks) * alone, 0, alone, 0)


def direct(route: Route, row: int) -> Traffic:
    """Each row from a rank that has it to the rank that consumes it, and its gradient back.

    Args:
        route: from encoder to decoder.
        row: bytes of one.
    """
    there, back = dict[int, int](), dict[int, int]()
    for (source, target), many in route.links.items():
        there[target] = there.get(target, 0) + many * row
        back[source] = back.get(source, 0) + many * row
    total = sum(there.values())
    return Traffic(total, total, max(there.values(), default=0), max(back.values(), default=0))


def ends(at: Boundary) -> tuple[End, End]:
    """Both ends, between the last stage of an encoder and the first of a decoder.

    Encoder ranks have even contiguous parts of all rows. Each decoder replica consumes as many; its
    context-parallel ranks have a part from the front of the sequence and one from the back each, of which
    tensor-parallel ranks have even parts.
    """
    decoder, many, ranks = at.decoder, count(at.images), at.encoder.stage(-1)
    source = dict(zip(ranks, contiguous(_even(many * decoder.dp, len(ranks))), strict=True))
    target: dict[int, Holding] = {}
    points = [at.tokens * i // (2 * decoder.cp) for i in range(2 * decoder.cp + 1)]
    chunks = [Run(start, stop - start) for start, stop in pairwise(points)]
    for i, rank in enumerate(decoder.stage(0)):
        cp, tp = divmod(i % decoder.wide, decoder.tp)
        held = _part((chunks[cp], chunks[-1 - cp]), tp, decoder.tp)
        before = i // decoder.wide * many
        target[rank] = tuple(Run(before + run.start, run.length) for run in rows(at.images, held))
    return End(source), End(target)


def compared(boundaries: Sequence[Boundary], what: Literal["forward", "backward"]) -> Table:
    """What crosses in each of the three ways, in one direction: by all ranks, and by that which has most."""
    lines: list[tuple[str, ...]] = []
    for at in boundaries:
        ways = leader(at), gather(at), direct(compile_route(*ends(at)), at.row)
        cells = [at.name, str(at.encoder), str(at.decoder), bytes_words(at.size)]
        for field in (what, f"{what}_rank"):
            cells += ["-" if way is None else bytes_words(getattr(way, field)) for way in ways]
        lines.append(tuple(cells))
    ways = ("leader", "gather", "direct")
    head = "configuration", "encoder", "decoder", "B", *ways, *(f"{way}, rank" for way in ways)
    return Table(f"Bytes between encoder and decoder, {what}", head, tuple(lines))


def _even(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _part(holding: Holding, number: int, parts: int) -> Holding:
    """Of the rows of a holding, one of even parts."""
    ends = [count(holding) * i // parts for i in (number, number + 1)]
    found, at = list[Run](), 0
    for run in holding:
        start, stop = max(ends[0], at), min(ends[1], at + run.length)
        if start < stop:
            found.append(Run(run.start + start - at, stop - start))
        at += run.length
    return tuple(found)
