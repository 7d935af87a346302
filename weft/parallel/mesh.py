"""One rank's view of a layout: its place, and communicators along the axes of the grid."""

from typing import TypeVar

from weft.config.base import Config
from weft.parallel.comm import Comm
from weft.plan.layout import Layout, plan_of
from weft.plan.shard import Held, held, local_shape, localize
from weft.spec.layout import PlanConfig
from weft.spec.param import ParamSpec

C = TypeVar("C", bound=Config)


class Mesh:
    """A layout with the communicator that joins its ranks.

    Attributes:
        layout: the grid and what is cut over it.
        comm: all ranks of the run.
        place: this rank's number on the tensor plane.
    """

    def __init__(self, layout: Layout, comm: Comm) -> None:
        self.layout, self.comm = layout, comm
        self.rank = comm.ranks[comm.rank]
        self.plane = layout.plane
        self.place = layout.place(self.rank)

    def axis(self, *axes: str) -> Comm:
        """The ranks that differ from this one in nothing but these axes."""
        return self.comm.group(self.layout.grid.group(self.rank, *axes))

    @property
    def store(self) -> Comm:
        """The ranks over which the store cuts what this rank holds."""
        return self.comm.group(self.layout.store_group(self.rank))

    @property
    def reader(self) -> int:
        """Which of ``layout.readers`` shares of the samples this rank reads."""
        return self.layout.grid.index(self.rank, "dp")

    @property
    def leads(self) -> bool:
        """Whether this rank counts the samples that its tensor plane reads together."""
        return self.place == 0 and self.layout.grid.index(self.rank, "cp") == 0

    def held(self, spec: ParamSpec) -> tuple[Held, ...]:
        """Boxes of a parameter at this rank's place."""
        return held(spec, self.plane, self.place)

    def shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Shape of this rank's tensor of a parameter."""
        return local_shape(spec, self.plane, self.place)

    def localize(self, config: C) -> C:
        """A layer as this rank computes it."""
        return localize(config, self.plane, self.place)

    def rows(self, tokens: int) -> slice:
        """Of so many tokens, those whose whole features this rank has between sharded layers."""
        rows = self.plane.rows(tokens, self.place)
        return slice(rows.start, rows.stop)

    def holders(self, box: Held) -> tuple[int, ...]:
        """Ranks that hold the same box: the gradient of it is the sum over them."""
        return self.layout.holders(self.rank, box.holders)


def mesh_of(plan: PlanConfig, comm: Comm) -> Mesh:
    """The mesh of this rank under a plan for all ranks of ``comm``.

    Raises:
        ConfigError: sizes that do not fill the ranks.
    """
    return Mesh(plan_of(plan, comm.size).decoder, comm)
