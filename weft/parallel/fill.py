"""Filling a model's slots for one rank of a layout: the table from dimension names to collectives.

Between layers, tokens are split over every rank that does not share the residual width; inside, the kinds of
a projection's dimensions decide (``weft.plan.shard``):

    from, to         before the product        after the product
    embed,  inner    gather tokens (tp)        scatter features (tp_embed)
    inner,  embed    gather features (tp_embed) scatter tokens (tp)
    embed,  plain    -                         scatter tokens (tp_embed)
    plain,  embed    gather tokens (tp_embed)  -
    embed,  embed    -                         scatter features (tp_embed)
    plain,  inner    gather tokens (plane)     -
    inner,  plain    -                         scatter tokens (plane)
    plain,  plain    -                         -

A projection from one inner dimension to another is refused: its weight could be cut by one of them only.
Attention, scans and the exchange with experts have no weight that says how they are cut: the grids do.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from weft.nn.moe import MoE
from weft.nn.router import Router
from weft.nn.slots import (
    Attend,
    Enter,
    Exchange,
    Halo,
    Leave,
    Lookup,
    Loss,
    Product,
    Regroup,
    Scan,
    Total,
)
from weft.parallel import moves
from weft.parallel.attend import ContextAttend
from weft.parallel.comm import Comm
from weft.parallel.dispatch import ShardedExchange, expert_comms
from weft.parallel.mesh import Mesh
from weft.parallel.moves import Blocks, Features, Move, Rows, Swap
from weft.parallel.pieces import ContextHalo, ShardedRegroup
from weft.parallel.scan import ContextScan
from weft.parallel.vocabulary import ShardedLookup, ShardedLoss
from weft.plan.exchanges import transport_of
from weft.plan.shard import features
from weft.spec.param import Dim, ParamSpec, Part

MoveOf = Callable[[int], Move]  # of the number of tokens


class ShardedProduct(Product):
    """A projection between the moves that its dimensions ask for."""

    alone = False

    def __init__(self, before: MoveOf | None, after: MoveOf | None) -> None:
        super().__init__()
        self._before, self._after = before, after

    def forward(
        self, x: Float[Tensor, "tokens cols"], weight: Float[Tensor, "rows own"], tokens: int
    ) -> Float[Tensor, "some width"]:
        """This rank's tokens and features of the projection."""
        before = self._before(tokens) if self._before else None
        after = self._after(tokens) if self._after else None
        return moves.product(x, weight, before, after)


class ShardedEnter(Enter):
    """Part of the features of the residual's tokens -> whole features of a part of them."""

    def __init__(self, move: MoveOf) -> None:
        super().__init__()
        self._move = move

    def forward(self, x: Float[Tensor, "tokens width"], tokens: int) -> Float[Tensor, "own embed"]:
        """Swap features for tokens."""
        return moves.gather(self._move(tokens), x)


class ShardedLeave(Leave):
    """The way back from ``ShardedEnter``."""

    def __init__(self, move: MoveOf) -> None:
        super().__init__()
        self._move = move

    def forward(self, x: Float[Tensor, "own embed"], tokens: int) -> Float[Tensor, "tokens width"]:
        """Swap tokens for features."""
        return moves.scatter(self._move(tokens), x)


class ShardedTotal(Total):
    """Sum over the ranks of a group."""

    alone = False

    def __init__(self, slot: Total, comm: Comm) -> None:
        super().__init__(slot.over, slot.group)
        self._comm = comm

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The complete statistic."""
        return moves.total(self._comm, x)


class _Filler:
    """Makes the slots of one rank."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.plane = mesh, mesh.plane
        self.tp, self.wide = mesh.axis("tp"), mesh.axis("tp_embed")
        self.all = mesh.axis("tp", "tp_embed")
        self.sharing = mesh.axis("cp")

    def tokens_tp(self, tokens: int) -> Move:
        """Tokens over tp."""
        return Rows(self.tp, self._counts(tokens))

    def tokens_wide(self, tokens: int) -> Move:
        """Tokens of one row of the plane over tp_embed."""
        return Rows(self.wide, self._inside(tokens))

    def tokens_all(self, tokens: int) -> Move:
        """Tokens over the plane."""
        return Rows(self.all, [len(self.plane.rows(tokens, place)) for place in range(self.plane.size)])

    def blocks(self, tokens: int) -> Blocks:
        """The residual stream's tokens and features."""
        return Blocks(self.all, self._counts(tokens), self.plane.tp_embed)

    def swap(self, tokens: int) -> Move:
        """Features over tp_embed against tokens."""
        return Swap(self.wide, self._inside(tokens))

    def _counts(self, tokens: int) -> list[int]:
        step = self.plane.tp_embed
        return [len(self.plane.residual_rows(tokens, row * step)) for row in range(self.plane.tp)]

    def _inside(self, tokens: int) -> list[int]:
        first = self.mesh.place - self.mesh.place % self.plane.tp_embed
        return [len(self.plane.rows(tokens, first + e)) for e in range(self.plane.tp_embed)]

    def features(self, dim: Dim, device: torch.device, once: bool = False) -> MoveOf | None:
        """Features of one row of the plane over tp_embed."""
        if self.wide.size == 1:
            return None
        move = Features(self.wide, features(dim, self.plane, self.mesh.place), device, once)
        return lambda tokens: move

    def product(self, rows: Dim, cols: Dim, device: torch.device) -> Product | None:
        """The projection from ``cols`` to ``rows``; None where nothing has to move."""
        tp = self.tokens_tp if self.tp.size > 1 else None
        wide = self.tokens_wide if self.wide.size > 1 else None
        match self.plane.kind(cols), self.plane.kind(rows):
            case "embed", "inner":
                pair = tp, self.features(rows, device)
            case "inner", "embed":
                pair = self.features(cols, device, once=True), tp
            case "embed", "plain":
                pair = None, wide
            case "plain", "embed":
                pair = wide, None
            case "embed", "embed":
                pair = None, self.features(rows, device)
            case "plain", "inner":
                pair = self.tokens_all, None
            case "inner", "plain":
                pair = None, self.tokens_all
            case _:  # plain to plain; a weight with two inner dimensions is held by nobody (plan.shard)
                pair = None, None
        return ShardedProduct(*pair) if any(pair) else None

    def total(self, slot: Total, spec: ParamSpec) -> Total | None:
        """The sum over the ranks that share a norm's group, or the tokens."""
        if slot.over != "features":
            axes = ("cp", "tp", "tp_embed") if slot.over == "tokens" else ("dp", "cp", "tp", "tp_embed")
            ranks = self.mesh.axis(*axes)
            return ShardedTotal(slot, ranks) if ranks.size > 1 else None
        kind, width = self.plane.kind(spec.dims[0]), self.mesh.shape(spec)[0]
        span = slot.group // width
        if span <= 1 or kind == "plain":
            return None
        ranks = (self.wide if kind == "embed" else self.all).ranks
        first = ranks.index(self.mesh.rank) // span * span
        return ShardedTotal(slot, self.mesh.comm.group(ranks[first : first + span]))

    def slot(self, slot: nn.Module, spec: ParamSpec, device: torch.device) -> nn.Module | None:
        """What takes the place of a slot of the layer that owns the weight ``spec``; None if it stays."""
        match slot:
            case Product():
                return self.product(spec.dims[0], spec.dims[1], device)
            case Total():
                return self.total(slot, spec)
            case Lookup() if self.all.size > 1:
                return ShardedLookup(self.vocabulary(spec), self.blocks)
            case Loss() if self.all.size > 1:
                return ShardedLoss(self.vocabulary(spec), self.blocks, self.mesh.place, self.plane)
            case _:
                return None

    def vocabulary(self, spec: ParamSpec) -> range:
        """Rows of a token table that are here."""
        box = self.mesh.held(spec)[0].box
        return range(box.start[0], box.stop[0])

    def peers(self, slot: nn.Module, layer: nn.Module) -> nn.Module | None:
        """What takes the place of a slot whose tensors say how they are laid out; None if it stays."""
        match slot:
            case Enter() if self.wide.size > 1:
                return ShardedEnter(self.swap)
            case Leave() if self.wide.size > 1:
                return ShardedLeave(self.swap)
            case Exchange() if self.mesh.plan.experts.places > 1 and isinstance(layer, MoE):
                return self.exchange(layer)
            case _:
                return self.along(slot)

    def along(self, slot: nn.Module) -> nn.Module | None:
        """What takes the place of a slot that works along a run of tokens or rows; None if it stays."""
        match slot:
            case Attend() if self.sharing.size > 1:
                return ContextAttend(self.sharing, self.mesh.layout.attend)
            case Scan() if self.sharing.size > 1:
                return ContextScan(slot.chunk, self.sharing, self.mesh.layout.scan)
            case Halo() if self.sharing.size > 1:
                return ContextHalo(slot.rows, self.sharing)
            case Regroup() if self.all.size > 1:
                return ShardedRegroup(slot, self.all, self.plane)
            case _:
                return None

    def exchange(self, layer: MoE) -> Exchange:
        """The exchange with the ranks that have other experts, or other parts of these."""
        plan, up = self.mesh.plan.experts, layer.experts.up_proj
        whole = replace(layer.config, embed=layer.config.embed * self.plane.tp_embed)
        comms = expert_comms(self.mesh.experts("ep", "etp"), plan.grid.size("etp"), plan.node)
        return ShardedExchange(comms, whole.experts, transport_of(whole, plan, up.element_size()))

    def router(self, router: Router) -> None:
        """Tell a router which tokens and features are where."""
        plane, place = self.plane, self.mesh.place
        width = Part("embed", router.config.embed * plane.tp_embed)

        def block(tokens: int) -> tuple[slice, range]:
            rows = plane.residual_rows(tokens, place)
            return slice(rows.start, rows.stop), plane.items(width, place)

        router.block, router.parts = block, self.mesh.routed


def fill(model: nn.Module, specs: Iterable[ParamSpec], mesh: Mesh) -> None:
    """Put what the layout of ``mesh`` asks for into every slot of a model; a collective call."""
    filler = _Filler(mesh)
    specs_of = {id(model.get_parameter(spec.name)): spec for spec in specs if not spec.buffer}
    for layer in list(model.modules()):
        if isinstance(layer, Router):
            filler.router(layer)
        weight = layer._parameters.get("weight")
        spec = specs_of.get(id(weight))  # of a tied head too
        for place, slot in list(layer.named_children()):
            filled = filler.peers(slot, layer)
            if filled is None and spec and weight is not None:
                filled = filler.slot(slot, spec, weight.device)
            if filled:
                setattr(layer, place, filled)
