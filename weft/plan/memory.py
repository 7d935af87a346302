"""Bytes that a plan asks of one rank: state exactly, activations as an estimate.

State is what rests: weights, gradients, master copies and moments of the rank's boxes, cut by the store (but
for the few elements that align buffers). What a unit needs on top while it runs is counted for the largest
units. Activations are what autograd keeps of one microbatch between forward and backward (see ``_kept``);
attention's scores, gathered copies of activations and the allocator's slack are not counted.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from weft.plan.layout import Plan, of_experts
from weft.plan.shard import localize
from weft.plan.step import schedule_of
from weft.plan.units import Unit, units
from weft.spec.count import StateBytes, state_of
from weft.spec.hybrid import HybridConfig
from weft.spec.layers import AttentionConfig, MambaConfig, MixerConfig, MLPConfig, MoEConfig
from weft.spec.param import ParamSpec, size
from weft.spec.precision import ITEMSIZE, PRECISIONS
from weft.spec.run import RunConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: parameters as layers read them, between uses.
        gradients: sums over microbatches, between uses.
        master: what the optimizer writes, where layers read another dtype or more than this rank's cut of it.
        moments: the two moments of AdamW.
        gathered: whole weights (store level 3) and gradients (from level 2) of the units at work.
        activations: an estimate of what the microbatches in flight keep.
    """

    weights: int = 0
    gradients: int = 0
    master: int = 0
    moments: int = 0
    gathered: int = 0
    activations: int = 0

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def state(self) -> int:
        """What rests."""
        return self.weights + self.gradients + self.master + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.gathered + self.activations


def largest(run: RunConfig, plan: Plan) -> tuple[int, Memory]:
    """The first rank that needs most, and what it needs.

    One rank of each stage is looked at: uneven cuts (``shard.share``) give the first place the most.
    """
    firsts = plan.dense.firsts
    return max(((rank, memory(run, plan.of_rank(rank), rank)) for rank in firsts), key=lambda p: p[1].total)


def memory(run: RunConfig, plan: Plan, rank: int) -> Memory:
    """Bytes on ``rank``; its cuts of the store's buffers count as the largest ones."""
    position = plan.position(rank)
    total, working = Memory(), [0]
    for unit in units(run.model):
        count = unit.at(plan, position)
        if count:
            rests, busy = _unit(plan, unit, rank, run.train.precision)
            total += Memory(**{f.name: count * getattr(rests, f.name) for f in fields(rests)})
            working += [busy] * min(count, 2 + plan.dense.store.prefetch)
    at_work = sum(sorted(working)[-1 - plan.dense.store.prefetch :])
    return total + Memory(gathered=at_work, activations=_activations(run, plan, rank))


def _unit(plan: Plan, unit: Unit, rank: int, precision: str) -> tuple[Memory, int]:
    """What rests of one unit, and the bytes of its whole weights and gradients where those are cut."""
    level = plan.dense.store.level
    buffers: dict[tuple[StateBytes, bool, bool], tuple[int, int]] = {}
    for spec in unit.specs:
        key = state_of(spec, precision), spec.decay, of_experts(spec)
        elements, _ = buffers.get(key, (0, 1))
        cuts, _ = plan.rests(spec, rank)
        buffers[key] = elements + math.prod(plan.shape(spec, rank)), cuts
    rests, busy = Memory(), 0
    for (state, _, _), (whole, cuts) in buffers.items():
        cut = -(-whole // cuts)
        own = cut if cuts > 1 and level < 3 else 0  # what the optimizer writes lies beside what layers read
        rests += Memory(
            weights=state.weight * (cut if level >= 3 else whole),
            gradients=state.gradient * (cut if level >= 2 else whole + own),
            master=state.master * cut + state.weight * own,
            moments=state.moments * cut,
        )
        if cuts > 1:
            busy += whole * (state.weight * (level >= 3) + state.gradient * (level >= 2))
    return rests, busy


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one microbatch on one tensor plane, and bytes of their activations.

    Attributes:
        all: where inner dimensions are cut.
        residual: of this rank between layers.
        plain: of this rank where features are whole.
        item: bytes of an activation.
        exact: bytes of router scores and scan states.
        etp: ranks that have parts of each expert and see the same tokens.
    """

    all: int
    residual: int
    plain: int
    item: int
    exact: int
    etp: int


def _activations(run: RunConfig, plan: Plan, rank: int) -> int:
    """Bytes kept by the passes in flight (as the schedule is proved to have them), and by the head.

    Where a pipeline rank has several stages, each pass counts as the mean of them.
    """
    model, grid, plane = run.model, plan.dense.grid, plan.dense.plane
    position, place = plan.position(rank), plan.dense.place(rank)
    sequences = -(-plan.together(run.train) // plan.dense.readers)
    last = position in plan.positions("head")
    policy = PRECISIONS[run.train.precision]
    count = -(-sequences * run.data.seq_length // grid.size("cp"))
    tokens = _Tokens(
        count,
        len(plane.residual_rows(count, 0)),
        len(plane.rows(count, 0)),
        ITEMSIZE[policy.params],
        ITEMSIZE[policy.master],
        plan.experts.grid.size("etp"),
    )
    width = -(-model.hidden_size // plane.tp_embed) * tokens.item
    kept, largest_layer = 0, 0
    for unit in units(model):
        if unit.block is None:
            continue
        here = unit.at(plan, position)
        if model.mtp and last:  # one physical depth may run several times
            ahead = sum(name.startswith("mtp.") for name in unit.names)
            here += ahead * (model.depths - len(model.mtp)) // len(model.mtp)
        inner = tokens.residual * width + _kept(localize(unit.block.mixer, plane, place), tokens, plane.size)
        kept += here * (tokens.residual * width + (0 if run.train.recompute else inner))
        largest_layer = max(largest_layer, inner if here and run.train.recompute else 0)
    return (
        math.ceil(kept * _in_flight(run, plan, position))
        + largest_layer
        + (_head(model, run.train.loss_chunk, tokens, plane.size, width) if last else 0)
    )


def _in_flight(run: RunConfig, plan: Plan, position: int) -> float:
    """Microbatches of which a pipeline rank keeps what all its stages keep."""
    if plan.cut is None or len(plan.cut.pieces) == 1:
        return 1.0
    level, parts = plan.dense.store.level, plan.microbatches(run.train)
    _, proof = schedule_of(plan.schedule, plan.cut, parts, level)
    return proof.live[position] / len(plan.cut.at(position)) if proof.live else 1.0


def _kept(mixer: MixerConfig, tokens: _Tokens, plane: int) -> int:
    """Bytes that the backward pass of one mixer reads, besides its input.

    Per token: attention keeps q, k, v and its result; Mamba-2 the fused projection, the convolution, the
    scan's result and the normed result, and a state per chunk; an MLP its inner activation (its square too
    where the vocabulary of collectives splits it from its second product); a mixture its scores twice, the
    latent copies, and for each chosen expert what goes in and the inner activation (its weight is applied
    before the second product). A layer that is not known keeps what goes in and out of each of its products.
    """
    every, own, item = tokens.all, tokens.plain, tokens.item
    match mixer:
        case AttentionConfig():
            return every * item * 2 * (mixer.heads + mixer.kv_heads) * mixer.head_dim
        case MambaConfig():
            features = size(mixer.in_rows) + size(mixer.conv_rows) + 2 * mixer.inner
            states = -(-every // mixer.chunk) * mixer.inner * mixer.state
            return every * features * item + states * tokens.exact
        case MLPConfig():
            return every * item * mixer.mlp * (1 if plane == 1 else 2)
        case MoEConfig():
            chosen = mixer.router.top_k * (tokens.etp * mixer.width + mixer.mlp)
            routed = own * item * (chosen + 2 * mixer.latent)
            shared = _kept(mixer.shared, tokens, plane) if mixer.shared_mlp else 0
            return own * tokens.exact * 2 * mixer.experts + routed + shared
        case _:
            return every * item * _products(mixer.params())


def _products(specs: Iterable[ParamSpec]) -> int:
    return sum(sum(spec.shape) for spec in specs if len(spec.dims) == 2)


def _head(model: HybridConfig, chunk: int, tokens: _Tokens, plane: int, width: int) -> int:
    """Gradients of the states, two chunks of logits, and the head's weight and gradient in wide numbers."""
    vocab = -(-model.vocab_size // plane)
    wide = vocab * model.hidden_size * tokens.exact * (2 if tokens.item < tokens.exact else 1)
    states = (1 + model.depths) * tokens.residual * width * 2
    return wide + states + 2 * min(chunk, tokens.all) * vocab * tokens.exact
