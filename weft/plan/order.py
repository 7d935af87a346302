"""Computations of seats in blocks, and an order in which all of them can be done."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from weft.plan.schedule import Action, Graph

_LEAST = 1e-6  # cost of a block that costs nothing, so that it ends after it begins
# What stands between two computations, in this order (see ``placing``).
ORDER = (
    "send",
    "sent",
    "OUT",
    "FREE",
    "REDUCE",
    "receive",
    "GATHER",
    "IN",
    "received",
    "over",
    "sum",
    "STEP",
)


class Blocks:
    """A seat's computations in blocks between which other actions are put; a B with its W is one block.

    Attributes:
        blocks: an F, B or W, or a B and its W.
        index: block of each computation.
    """

    def __init__(self, actions: Iterable[Action], apart: Container[str] = ()) -> None:
        """``apart``: stages whose B is a block of its own."""
        self.blocks: list[tuple[Action, ...]] = []
        for done in actions:
            whole = done._replace(op="B") if done.op == "W" and done.unit not in apart else None
            if self.blocks and self.blocks[-1] == (whole,):
                self.blocks[-1] = (*self.blocks[-1], done)
            else:
                self.blocks.append((done,))
        self.index = {done: index for index, block in enumerate(self.blocks) for done in block}
        self._between: list[list[tuple[int, Action]]] = [[] for _ in range(len(self.blocks) + 1)]

    def put(self, gap: int, order: str, done: Action) -> None:
        """Before the block of this index, or after all; in the order of calls among its like."""
        self._between[gap].append((ORDER.index(order), done))

    def merged(self) -> Iterator[Action]:
        """Everything, in order."""
        for index, others in enumerate(self._between):
            yield from (done for _, done in sorted(others, key=lambda entry: entry[0]))
            yield from self.blocks[index] if index < len(self.blocks) else ()


Clock = list[int]
"""How many blocks of each seat are over."""
Spot = tuple[float, float]
"""When a block begins and ends; what needs another begins when that has ended."""


def clocks_of(
    graph: Graph, made: Sequence[Blocks], microbatches: int, cost: Callable[[Action], float]
) -> tuple[list[list[Clock]], list[list[Spot]]]:
    """Of each seat's blocks: what is over once a block is, and when that would be at these costs.

    A seat's blocks end where the lists run into a deadlock.
    """
    found = _Clocks(graph, made, microbatches, cost)
    while sum(found.begin(seat) for seat in range(len(made))):
        pass
    return found.clocks, found.spots


class _Clocks:
    """Vector clocks of the blocks that have begun, and their times."""

    def __init__(
        self, graph: Graph, made: Sequence[Blocks], microbatches: int, cost: Callable[[Action], float]
    ) -> None:
        self.clocks: list[list[Clock]] = [[] for _ in made]
        self.spots: list[list[Spot]] = [[] for _ in made]
        self._graph, self._made, self._microbatches, self._cost = graph, made, microbatches, cost

    def begin(self, seat: int) -> bool:
        """Do the next block of a seat if it can be done, with all seats that do it too."""
        block = self._next(seat)
        seats = self._graph.meeting(block[0]) or (seat,) if block else ()
        if not block or any(self._next(other) != block for other in seats):
            return False
        needed = [pair for other in seats for pair in self._needed(other, block)]
        if any(index >= len(self.clocks[other]) for other, index in needed):
            return False
        needed += [(other, len(self.clocks[other]) - 1) for other in seats if self.clocks[other]]
        clock = [
            max(column)
            for column in zip([0] * len(self._made), *(self.clocks[o][i] for o, i in needed), strict=True)
        ]
        start = max((self.spots[other][index][1] for other, index in needed), default=0.0)
        end = start + max(_LEAST, sum(map(self._cost, block)))
        for other in seats:
            clock[other] = len(self.clocks[other]) + 1
        for other in seats:
            self.clocks[other].append(clock)
            self.spots[other].append((start, end))
        return True

    def _next(self, seat: int) -> tuple[Action, ...]:
        blocks, at = self._made[seat].blocks, len(self.clocks[seat])
        return blocks[at] if at < len(blocks) else ()

    def _needed(self, seat: int, block: tuple[Action, ...]) -> Iterator[tuple[int, int]]:
        """Seats and blocks of what a block of a seat reads; lists may lack some."""
        for done in block:
            for other, need in self._graph.needs(seat, done, self._microbatches):
                if need in self._made[other].index:
                    yield other, self._made[other].index[need]
