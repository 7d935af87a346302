"""The residual stream between pipeline ranks: edges of a schedule as routes.

Between layers each rank has some tokens and some of their features. Pipeline ranks of one layout exchange
with the rank at the same place; where they differ in tensor or data parallelism, the rows of each token go to
whoever has that token next, which follows from the sizes of the samples.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from weft.parallel.mesh import Mesh
from weft.parallel.route import Arrival, Channel
from weft.plan.boundary import residual
from weft.plan.layout import Plan
from weft.plan.route import End, Route, compile_route, transpose
from weft.plan.runs import Run
from weft.plan.schedule import Action, Edge
from weft.spec.param import Part


class Links:
    """Channels of one rank of a module, two for each edge between its pipeline ranks; a collective call.

    Args:
        mesh: the rank's place.
        edges: of the schedule, with the pipeline ranks of both ends.
        width: features of the residual stream, all of them.
        dtype: of activations.
        device: of activations.
    """

    def __init__(
        self,
        mesh: Mesh,
        edges: Mapping[Edge, tuple[int, int]],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.mesh, self.edges = mesh, edges
        self._channels: dict[tuple[Edge, bool], Channel] = {}
        columns = mesh.plane.items(Part("embed", width), mesh.place)
        for edge, homes in edges.items():
            for back in (False, True):
                ends = homes[::-1] if back else homes
                if ends[0] != ends[1] and mesh.position in ends:
                    ranks = _party(mesh, *ends)
                    name = f"{edge.source}{'<' if back else '>'}{edge.target}"
                    self._channels[edge, back] = Channel(
                        mesh.comm.group(ranks, name), (len(columns),), dtype, device
                    )
        self._routes = lru_cache(maxsize=256)(self._route)  # the same ones every step, where sizes repeat

    def post(
        self, action: Action, value: Tensor | None, tokens: int, sizes: Sequence[int] = ()
    ) -> Callable[[], Tensor | None]:
        """Launch a transfer; call what is returned to wait for it, and for what came.

        Args:
            action: the POST.
            value: [rows, features] where this rank is its source.
            tokens: of the microbatch, on this rank's reader.
            sizes: tokens of each sample of the microbatch, of all readers, where layouts differ.
        """
        return self._launch(action, value, self._routes(action.edge, action.back, tokens, tuple(sizes)))

    def post_rows(self, action: Action, value: Tensor | None, rows: int) -> Callable[[], Tensor | None]:
        """``post`` of so many rows between ranks of one place."""
        ends = self.edges[action.edge]
        there = _straight(*_party(self.mesh, *ends), rows)
        return self._launch(action, value, transpose(there) if action.back else there)

    def _launch(self, action: Action, value: Tensor | None, route: Route) -> Callable[[], Tensor | None]:
        arrival = self._channels[action.edge, action.back].post(route, value)
        return arrival.wait if value is None else lambda: _sent(arrival)

    def _route(self, edge: Edge, back: bool, tokens: int, sizes: tuple[int, ...]) -> Route:
        """Of activations, or of gradients on their way back."""
        if back:
            return transpose(self._routes(edge, False, tokens, sizes))
        source, target = self.edges[edge]
        mesh, whole = self.mesh, self.mesh.whole
        if _alike(whole, source, target):
            rows = len(mesh.plane.residual_rows(mesh.layout.tokens(tokens)[mesh.part], mesh.place))
            return _straight(*_party(mesh, source, target), rows)
        feature = mesh.place % mesh.plane.tp_embed
        return _between(whole, source, target, feature, sizes)


def _sent(arrival: Arrival) -> None:
    arrival.wait()


def _alike(plan: Plan, source: int, target: int) -> bool:
    return plan.at(source).dense.plane == plan.at(target).dense.plane


def _party(mesh: Mesh, source: int, target: int) -> tuple[int, ...]:
    """Ranks of two pipeline ranks that exchange with this one: senders, then receivers."""
    whole = mesh.whole
    if _alike(whole, source, target):
        column = mesh.layout.grid.group(mesh.rank, "pp")
        return column[source], column[target]
    wide = mesh.plane.tp_embed
    feature = mesh.place % wide
    return tuple(rank for position in (source, target) for rank in _at(whole, position, feature))


def _at(plan: Plan, position: int, feature: int) -> tuple[int, ...]:
    """Ranks of a pipeline rank that have these features of the residual stream."""
    layout = plan.at(position).dense
    wide = layout.plane.tp_embed
    return layout.holders((position,), tuple(range(feature, layout.places, wide)))


@lru_cache(maxsize=64)
def _straight(source: int, target: int, rows: int) -> Route:
    """All rows from one rank to another."""
    have, want = (End({rank: (Run(0, rows),) if rows else ()}) for rank in (source, target))
    return compile_route(have, want)


@lru_cache(maxsize=64)
def _between(plan: Plan, source: int, target: int, feature: int, sizes: tuple[int, ...]) -> Route:
    """Between layouts: every token from the rank that has it to the one that has it next."""
    have, want = (_end(plan, position, feature, sizes) for position in (source, target))
    return compile_route(have, want)


def _end(plan: Plan, position: int, feature: int, sizes: tuple[int, ...]) -> End:
    """The tokens of each rank of a pipeline rank that has these features, counted through all samples."""
    return End(
        {
            each.rank: (Run(each.tokens.start, len(each.tokens)),) if each.tokens else ()
            for each in residual(plan, position, sizes)
            if each.feature == feature
        }
    )
