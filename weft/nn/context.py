"""What one forward pass knows besides its activations."""

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from weft.nn.state import Cache
from weft.ops.segments import Segments
from weft.plan.items import Pieces


class Ran(NamedTuple):
    """What the recomputation of a router must find again besides its choices.

    Attributes:
        frequency: what the balance losses multiply the scores of each document by; None if they are off.
        forced: whether the choices were given.
    """

    frequency: Float[Tensor, "documents experts"] | None
    forced: bool


@dataclass
class Replay:
    """Router choices by layer: recorded where absent, forced where present.

    Recomputation runs a layer twice with one Replay, so the second run takes the first run's
    choices and can never change a shape.

    Attributes:
        choices: experts of each token; -1 is none, -2 - e is expert e, which had no room.
        ran: the routers that have run in training.
    """

    choices: dict[str, Int[Tensor, "tokens top_k"]] = field(default_factory=dict)
    ran: dict[str, Ran] = field(default_factory=dict)


class RouterStats(NamedTuple):
    """What a router reports: SUMs over the tokens here; losses are already times their coefficients.

    Attributes:
        balance: all balance losses.
        z: z-loss.
        entropy: of the normalized scores of each token, nats; NaN where a logit is not finite.
        counts: choices of each expert, those without room included.
        drop: choices that went nowhere for want of room.
    """

    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    counts: Int[Tensor, " experts"]
    drop: Int[Tensor, ""]


@dataclass
class Context:
    """One forward pass.

    Attributes:
        segments: documents of the flat run of tokens; with a cache, the new tokens of each sequence.
        replay: router choices to record or force.
        cache: states to read and write (generation), or None.
        stats: router statistics by layer, filled in by the model.
        rows: the tokens whose whole features this rank has between its sharded layers.
        places: number of each token here in the whole training run, the same under every layout (its sample
            times 2^32, plus its position): what randomness may depend on. None while generating.
        seed: of the run.
        full: tokens of each sample of the largest microbatch of any rank, where that is known: shapes that
            are to be static depend on nothing else.
        pieces: what an encoder computes; its ``lengths`` are those of ``segments``. None in a decoder.
        tally: how often each expert was chosen in the earlier forward passes of this step, by layer, summed
            over ranks.
    """

    segments: Segments
    replay: Replay = field(default_factory=Replay)
    cache: Cache | None = None
    stats: dict[str, RouterStats] = field(default_factory=dict)
    rows: slice = field(default_factory=lambda: slice(None))
    places: Int[Tensor, " tokens"] | None = None
    seed: int = 0
    full: tuple[int, ...] = ()
    pieces: Pieces | None = None
    tally: dict[str, Int[Tensor, " experts"]] = field(default_factory=dict)
