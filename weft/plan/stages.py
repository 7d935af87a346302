"""Cutting a model into pipeline stages: runs of layers of even cost, anywhere between two units.

The token table goes with the first stage; the final norm, the head and the MTP depths with the last one,
which has the token table too where it reads it (a tied head, MTP). Both then hold it, and its gradient is
the sum over both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from weft.plan.schedule import Action, Graph
from weft.spec.hybrid import BlockConfig, HybridConfig

CONTEXT = 2048.0  # mean keys that a token sees, where nobody says


@dataclass(frozen=True)
class Piece:
    """What one stage has of a model.

    Attributes:
        layers: main layers.
        first: whether it begins with the token table.
        last: whether it ends with the final norm, the head and the MTP depths.
        table: whether it holds the token table.
    """

    layers: range
    first: bool
    last: bool
    table: bool

    def has(self, name: str) -> bool:
        """Whether a unit, or the unit of a parameter, is here."""
        first, _, rest = name.partition(".")
        if first == "layers":
            return int(rest.partition(".")[0]) in self.layers
        if first == "projectors":  # of encoders: they write into the residual stream before the first layer
            return self.first
        return self.table if first == "embed" else self.last


@dataclass(frozen=True)
class Cost:
    """FLOPs of a token: forward pass, gradients of inputs, gradients of weights."""

    F: float = 0.0
    B: float = 0.0
    W: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.F + other.F, self.B + other.B, self.W + other.W)

    def times(self, factor: float) -> "Cost":
        """As often as that."""
        return Cost(factor * self.F, factor * self.B, factor * self.W)

    @property
    def total(self) -> float:
        """All three."""
        return self.F + self.B + self.W


@dataclass(frozen=True)
class Cut:
    """A model in stages.

    Attributes:
        pieces: of each stage, in the order of the model.
        home: pipeline rank of each stage.
        costs: of each stage.
    """

    pieces: tuple[Piece, ...]
    home: tuple[int, ...]
    costs: tuple[Cost, ...]

    @property
    def graph(self) -> Graph:
        """The stages as a chain."""
        return Graph.chain(self.home)

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """Pipeline ranks that have a unit (or the unit of a parameter), ascending."""
        pairs = zip(self.pieces, self.home, strict=True)
        return tuple(sorted({rank for piece, rank in pairs if piece.has(name)}))

    def at(self, rank: int) -> tuple[Piece, ...]:
        """Stages of a pipeline rank."""
        return tuple(piece for piece, home in zip(self.pieces, self.home, strict=True) if home == rank)

    def holds(self, rank: int, name: str) -> bool:
        """Whether a pipeline rank has a unit."""
        return any(piece.has(name) for piece in self.at(rank))

    def cost(self, action: Action) -> float:
        """FLOPs of a token in a pass; 0 for everything else."""
        return getattr(self.costs[int(action.unit)], action.op, 0.0) if action.unit else 0.0


@lru_cache(maxsize=32)
def cut(
    model: HybridConfig, home: tuple[int, ...], layers: tuple[int, ...] = (), context: float = CONTEXT
) -> Cut:
    """Cut a model.

    Args:
        model: the whole.
        home: pipeline rank of each stage.
        layers: of each stage; those of most even cost by default.
        context: mean keys that a token sees, for the cost of attention.

    Raises:
        ValueError: ``layers`` are not those of the model, or a stage would have nothing.
    """
    blocks = [_block(block, context) for block in model.blocks]
    tail = _tail(model, context)
    stages = len(home)
    own = [home[-1] == rank for rank in home]  # of the rank of the tail, which so gets fewer layers
    extra = tuple(here * tail.total / sum(own) for here in own)
    counts = layers or even([cost.total for cost in blocks], extra)
    _check(counts, stages, len(blocks))
    table = model.tie_word_embeddings or bool(model.depths)
    made = run_of(counts, home, table)
    costs = (
        sum((blocks[i] for i in piece.layers), start=tail if piece.last else Cost()) for piece in made.pieces
    )
    return replace(made, costs=tuple(costs))


def run_of(counts: Sequence[int], home: tuple[int, ...], table: bool = False) -> Cut:
    """So many layers in each stage, without costs; ``table``: the last stage holds the token table too."""
    last = len(counts) - 1
    pieces = tuple(
        Piece(range(start, stop), stage == 0, stage == last, stage == 0 or (table and stage == last))
        for stage, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0)))
    )
    return Cut(pieces, home, (Cost(),) * len(counts))


def _check(counts: Sequence[int], stages: int, layers: int) -> None:
    if len(counts) != stages or sum(counts) != layers or min(counts) < 0:
        raise ValueError(
            f"{list(counts)} are {sum(counts)} layers in {len(counts)} stages, but the model has {layers} "
            f"and there are {stages} stages; name one number of layers for each stage, {layers} in all"
        )
    empty = [stage for stage, count in enumerate(counts[1:-1], 1) if not count]
    if empty:
        raise ValueError(f"stage {empty[0]} of {stages} would have no layer; use fewer stages")


def even(costs: Sequence[float], extra: Sequence[float]) -> tuple[int, ...]:
    """Sizes of consecutive runs whose costs are as even as can be, one for each of ``extra``.

    Each run costs that besides its items. The largest cost is as small as possible, then the sum of squares.
    Every run but the last has an item. Raises ValueError if there are too few.
    """
    count, stages, sums = len(costs), len(extra), list(accumulate(costs, initial=0.0))
    if count < stages - (stages > 1):
        raise ValueError(f"{count} layers cannot be cut into {stages} stages; use at most {count}")
    # best[n]: of all ways to cut the first n items into the stages so far, the least (largest, squares, cuts)
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        final = stage == stages - 1
        least = int(not final)
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in [count] if final else range(stage + 1, count + 1):
            ways = [
                (max(largest, own), squares + own * own, (*sizes, stop - start))
                for start, (largest, squares, sizes) in best.items()
                if stop - start >= least and (own := sums[stop] - sums[start] + extra[stage]) >= 0
            ]
            if ways:
                found[stop] = min(ways)
        best = found
    return best[count][2]


def _block(block: BlockConfig, context: float) -> Cost:
    """Of a layer: what does not depend on the context is products with weights, which have three passes."""
    weights, whole = block.mixer.flops_per_token(0.0), block.mixer.flops_per_token(context)
    return Cost(whole, 2 * whole - weights, weights)


def _tail(model: HybridConfig, context: float) -> Cost:
    """Of the head, which forms its gradients in the forward pass, and of the MTP depths."""
    head = Cost(F=6.0 * model.vocab_size * model.hidden_size)
    joining = 4.0 * model.hidden_size**2
    total = head
    for depth in range(model.depths):
        blocks = model.mtp[depth % len(model.mtp)].blocks
        own = sum((_block(block, context) for block in blocks), start=Cost(joining, joining, joining))
        total += own + head
    return total
