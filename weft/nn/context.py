"""What one forward pass knows besides its activations."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from weft.nn.state import Cache
from weft.ops.segments import Segments


@dataclass
class Replay:
    """Router choices by layer: recorded where absent, forced where present.

    Recomputation runs a layer twice with one Replay, so the second run takes the first run's
    choices and can never change a shape.
    """

    choices: dict[str, Int[Tensor, "tokens top_k"]] = field(default_factory=dict)


class RouterStats(NamedTuple):
    """What a router reports: losses are SUMs over tokens, already times their coefficients."""

    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    counts: Int[Tensor, " experts"]


@dataclass
class Context:
    """One forward pass.

    Attributes:
        segments: documents of the flat run of tokens; with a cache, the new tokens of each sequence.
        replay: router choices to record or force.
        cache: states to read and write (generation), or None.
        stats: router statistics by layer, filled in by the model.
        rows: the tokens whose whole features this rank has between its sharded layers.
    """

    segments: Segments
    replay: Replay = field(default_factory=Replay)
    cache: Cache | None = None
    stats: dict[str, RouterStats] = field(default_factory=dict)
    rows: slice = field(default_factory=lambda: slice(None))
