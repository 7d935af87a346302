"""One rank's view of a plan: its place in each layout, and communicators along the axes of the grids."""

from itertools import accumulate, pairwise
from typing import TypeVar

from weft.config.base import Config
from weft.parallel.comm import Comm
from weft.plan.layout import Layout, Plan, plan_of
from weft.plan.shard import Held, localize
from weft.plan.stages import CONTEXT
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import PlanConfig
from weft.spec.param import ParamSpec

C = TypeVar("C", bound=Config)


class Mesh:
    """A plan with the communicator that joins its ranks.

    Attributes:
        whole: the plan of all pipeline ranks.
        plan: grids, and what is cut over them, of this rank's pipeline rank.
        layout: the decoder's.
        comm: all ranks of the run.
        position: this rank's pipeline rank.
        place: this rank's number on the tensor plane.
    """

    def __init__(self, plan: Plan, comm: Comm) -> None:
        self.rank = comm.ranks[comm.rank]
        self.whole, self.plan, self.comm = plan, plan.of_rank(self.rank), comm
        self.layout = self.plan.dense
        self.position = plan.position(self.rank)
        self.plane = self.layout.plane
        self.place = self.layout.place(self.rank)

    def has(self, name: str) -> bool:
        """Whether (a part of) a unit, or of the unit of a parameter, is here."""
        return self.position in self.plan.positions(name)

    def axis(self, *axes: str) -> Comm:
        """The ranks that differ from this one in nothing but these axes of the decoder's grid."""
        return self.comm.group(self.layout.grid.group(self.rank, *axes))

    def experts(self, *axes: str) -> Comm:
        """The ranks that differ from this one in nothing but these axes of the experts' grid."""
        return self.comm.group(self.plan.experts.grid.group(self.rank, *axes))

    def store(self, layout: Layout) -> Comm:
        """The ranks over which the store cuts what this rank holds of a role."""
        return self.comm.group(layout.store_group(self.rank))

    @property
    def reader(self) -> int:
        """Which of ``layout.readers`` shares of the samples this rank reads."""
        return self.layout.grid.index(self.rank, "dp")

    @property
    def part(self) -> int:
        """Which part of the tokens that its reader reads is here (``layout.tokens``)."""
        return self.layout.grid.index(self.rank, "cp")

    @property
    def leads(self) -> bool:
        """Whether this rank counts the samples that the ranks of its reader read together."""
        return self.place == 0 and self.part == 0 and self.position == 0

    @property
    def first(self) -> bool:
        """Whether this is the first rank of its pipeline rank."""
        return self.rank == self.layout.firsts[self.position]

    def held(self, spec: ParamSpec) -> tuple[Held, ...]:
        """Boxes of a parameter at this rank's place."""
        return self.plan.held(spec, self.rank)

    def shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Shape of this rank's tensor of a parameter."""
        return self.plan.shape(spec, self.rank)

    def localize(self, config: C) -> C:
        """A layer as this rank computes it."""
        return localize(config, self.plane, self.place)

    def rows(self, tokens: int) -> slice:
        """Of so many tokens of a part, those whose whole features this rank has between sharded layers."""
        rows = self.plane.rows(tokens, self.place)
        return slice(rows.start, rows.stop)

    def routed(self, tokens: int) -> tuple[range, ...]:
        """Of a whole run, the tokens of each rank (as ``rows``) of those that share it, in order."""
        starts = accumulate(self.layout.tokens(tokens), initial=0)
        return tuple(
            range(start + rows.start, start + rows.stop)
            for start, stop in pairwise(starts)
            for rows in (self.plane.rows(stop - start, place) for place in range(self.plane.size))
        )

    def holders(self, spec: ParamSpec, box: Held) -> tuple[int, ...]:
        """Ranks that hold the same box: the gradient of it is the sum over them."""
        return self.plan.of(spec).holders(self.plan.positions(spec.name), box.holders)


def mesh_of(
    plan: PlanConfig, comm: Comm, model: HybridConfig | None = None, context: float = CONTEXT
) -> Mesh:
    """The mesh of this rank under a plan for all ranks of ``comm``; stages need the model (``plan_of``).

    Raises:
        ConfigError: sizes that do not fill the ranks.
    """
    return Mesh(plan_of(plan, comm.size, model, context), comm)
