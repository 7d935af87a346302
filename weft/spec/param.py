"""ParamSpec: what a parameter is, before any tensor exists.

A dimension is a tuple of parts. Most have one part; fused projections have several
(``in_proj`` rows are ``[z | x | B | C | dt]``). Each part names the axis it is made of, so that
sharding a composite dimension shards every part by its own name (see docs/design.md).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Part:
    """``count`` items of the named ``axis``, each ``width`` rows wide."""

    axis: str
    count: int
    width: int = 1
    label: str = ""

    @property
    def size(self) -> int:
        """Rows this part spans."""
        return self.count * self.width


Dim = tuple[Part, ...]


def dim(axis: str, count: int, width: int = 1) -> Dim:
    """A dimension made of one part."""
    return (Part(axis, count, width),)


def size(dimension: Dim) -> int:
    """Rows of a (composite) dimension."""
    return sum(part.size for part in dimension)


InitKind = Literal["normal", "ones", "zeros", "log_arange", "dt_bias", "uniform"]


@dataclass(frozen=True)
class Init:
    """How a parameter starts. Values depend on (seed, name, global index), never on the layout.

    - ``normal``: N(0, ``scale``^2); ``uniform``: U(-``scale``, ``scale``)
    - ``log_arange``: log(1..n), the Mamba-2 ``A_log``
    - ``dt_bias``: inverse softplus of a log-uniform draw in [``low``, ``high``], at least ``floor``
    """

    kind: InitKind
    scale: float = 0.0
    low: float = 0.0
    high: float = 0.0
    floor: float = 0.0


ONES = Init("ones")
ZEROS = Init("zeros")


@dataclass(frozen=True)
class ParamSpec:
    """One parameter (or persistent buffer) of the model.

    Attributes:
        name: global dotted name, equal to the module path of the tensor.
        dims: one (composite) dimension per tensor axis.
        init: starting values.
        decay: whether weight decay applies (matrices yes; norms, biases, A_log, D, dt_bias no).
        fp32: kept in float32 under reduced precision (float64 under fp64).
        buffer: changed by a rule and not by gradients (the router's correction bias).
    """

    name: str
    dims: tuple[Dim, ...]
    init: Init
    decay: bool = True
    fp32: bool = False
    buffer: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return tuple(size(d) for d in self.dims)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def under(self, prefix: str) -> "ParamSpec":
        """The same parameter seen from the parent module ``prefix``."""
        return replace(self, name=f"{prefix}.{self.name}")
