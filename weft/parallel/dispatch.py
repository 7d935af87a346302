"""Expert dispatch over ranks: tokens to the ranks of their experts, and back.

One mechanism: a transport is a list of hops, and a hop is the map of ``weft.ops.dispatch`` from tokens to
(token, destination) rows with an exchange behind it. What is a destination is all that differs: the owners of
a token's slots (one row for each slot), every owner once, or every rank of the group. The way back is the
transpose: rows return as they came and are summed in slot order or in rank order.

========== =============================================================
all_gather  everyone of ep x etp
all_to_all  owners of the slots in ep, everyone of etp
per_rank    owners in ep, everyone of etp
per_node    owners among nodes, owners inside the node, everyone of etp
========== =============================================================

Tokens travel in one buffer with their routing weights; counts and expert numbers go ahead as metadata.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from weft.nn.slots import Arrived, Exchange, Send, arrange
from weft.ops.dispatch import Sorted, collect, inverse, ranked, sort, spread
from weft.parallel import moves
from weft.parallel.comm import Comm
from weft.plan.dispatch import Transport, groups

Rows = tuple[Tensor, Tensor]  # tokens and their weights
Told = tuple["_Route", Callable[[], Tensor]]  # a route, and the experts of the rows that arrive on it


class ExpertComms(NamedTuple):
    """The groups of one rank among the ep x etp ranks that hold every expert once.

    Attributes:
        whole: all of them, those of one expert range side by side.
        ep: with the same part of the inner width, one for each range of experts.
        etp: with the same experts, one for each part of the inner width.
        nodes: one rank of each node, at this rank's place; those of ``ep`` are ``nodes`` x ``inside``.
        inside: the ranks of ``ep`` on this node.
    """

    whole: Comm
    ep: Comm
    etp: Comm
    nodes: Comm
    inside: Comm


def expert_comms(whole: Comm, etp: int, node: int) -> ExpertComms:
    """The groups of this rank among ``whole.size`` = ep * etp ranks, etp inside, ``node`` of them on a node.

    Nodes that do not divide the ranks evenly count as one.
    """
    places = groups(whole.rank, whole.size, etp, node)
    return ExpertComms(*(whole.group([whole.ranks[i] for i in members]) for members in places))


@dataclass(frozen=True)
class _Route:
    """Rows of one hop, known on both ends.

    Attributes:
        comm: the group they travel in.
        order: the (token, destination) pair of each row that leaves.
        back: the row of each pair.
        full: neither has a -1.
        counts: rows to and from each rank.
        single: destinations are slots, so that each row takes the weight of its slot and no other.
    """

    comm: Comm
    order: Tensor
    back: Tensor
    full: bool
    counts: tuple[list[int], list[int]]
    single: bool

    def there(self, x: Tensor, weights: Tensor) -> Callable[[], Rows]:
        """Tokens and weights, under way."""
        if self.single:
            own = spread(weights.reshape(-1, 1), self.order, self.back.view(-1, 1), self.full)
            packed = torch.cat([spread(x, self.order, self.back, self.full), own], 1)
        else:
            packed = spread(torch.cat([x, weights], 1), self.order, self.back, self.full)
        arrive = moves.start_exchange(self.comm, packed, *self.counts)
        widths = [x.shape[1], packed.shape[1] - x.shape[1]]

        def unpacked() -> Rows:
            tokens, weights = arrive().split(widths, 1)
            return tokens, weights

        return unpacked

    def home(self, y: Tensor) -> Callable[[], Tensor]:
        """Results of the rows that came, under way to where they are summed."""
        send, receive = self.counts
        arrive = moves.start_exchange(self.comm, y, receive, send)
        return lambda: collect(arrive(), self.order, self.back, self.full)


@dataclass(frozen=True)
class _Hop:
    """One exchange of tokens in a group.

    Attributes:
        comm: the group.
        to: owners of the slots, one row for each; owners, each once; or everyone.
        first: first expert of the group.
        per: experts of one member, in order.
    """

    comm: Comm
    to: Literal["slots", "owners", "everyone"]
    first: int = 0
    per: int = 1

    def announce(self, experts: Int[Tensor, "tokens slots"], bound: int | None) -> Callable[[], Told]:
        """Say how many rows go where, under way; with ``bound`` that is known to all and nothing is said."""
        if bound is not None:
            return lambda: self._fixed(experts, bound)
        to = self._destinations(experts)
        _, pairs, starts = ranked(to, self.comm.size)
        sent, ones = starts.diff(), [1] * self.comm.size
        with self.comm.metadata():
            pending = self.comm.start_all_to_all_v(sent, ones, ones)

        def told() -> Told:
            send, receive = torch.stack([sent, pending.wait()]).tolist()
            order = pairs[: sum(send)]
            back, full = inverse(order, to.shape), len(order) == len(pairs)
            route = _Route(self.comm, order, back, full, (send, receive), self.to == "slots")
            rows = experts.reshape(-1, 1)[order] if route.single else experts[order // to.shape[1]]
            with self.comm.metadata():
                known = self.comm.start_all_to_all_v(rows.int(), send, receive)
            return route, lambda: known.wait().long()

        return told

    def _destinations(self, experts: Tensor) -> Tensor:
        """Members of the group that each token goes to; -1 is none."""
        size = self.comm.size
        members = torch.arange(size, device=experts.device).expand(len(experts), size)
        if self.to == "everyone":
            return members
        owner = (experts - self.first).div(self.per, rounding_mode="floor")
        owner = owner.masked_fill((owner < 0) | (owner >= size), -1)
        if self.to == "slots":
            return owner
        owns = torch.zeros(len(experts), size + 1, dtype=torch.bool, device=experts.device)
        owns.scatter_(1, owner.masked_fill(owner < 0, size), True)
        return members.masked_fill(~owns[:, :size], -1)

    def _fixed(self, experts: Tensor, bound: int) -> Told:
        """Without a word: every expert gets ``bound`` rows of each rank; a row's place says its expert."""
        size = self.comm.size
        if self.to == "everyone":
            to = self._destinations(experts)
            order, full, count = ranked(to, size)[1], True, len(experts)
            back = inverse(order, to.shape)
        else:
            order, back, _, full = sort(experts, size * self.per, bound)
            count = self.per * bound
        counts = [count] * size
        placeholder = order.new_empty(count * size, 1)
        return _Route(self.comm, order, back, full, (counts, counts), self.to == "slots"), lambda: placeholder


class ShardedExchange(Exchange):
    """Experts over ``comms.ep``, their inner width over ``comms.etp`` (outputs are partial sums over it).

    With ``bound``, one number for all ranks of ``comms.whole``, every expert gets ``bound`` rows of each of
    them, some of them padding. Over all_to_all those are what travels: shapes are static and the host waits
    for nothing. The other transports send as many rows as there are; only the rows of experts are static.

    Args:
        comms: groups of this rank.
        experts: routed experts, a multiple of the ranks of ``comms.ep``.
        transport: how tokens travel; they compute the same.
    """

    alone = False

    def __init__(self, comms: ExpertComms, experts: int, transport: Transport) -> None:
        super().__init__()
        ep, etp, nodes, inside = comms.ep, comms.etp, comms.nodes, comms.inside
        self._per = experts // ep.size
        self._first = ep.rank * self._per
        self._ranks = comms.whole.size
        self._static = transport == "all_to_all"
        if transport == "all_gather":
            self._hops = [_Hop(comms.whole, "everyone")]
            return
        first = nodes.rank * inside.size * self._per
        self._hops = {
            "all_to_all": [_Hop(ep, "slots", 0, self._per)],
            "per_rank": [_Hop(ep, "owners", 0, self._per)],
            "per_node": [
                _Hop(nodes, "owners", 0, inside.size * self._per),
                _Hop(inside, "owners", first, self._per),
            ],
        }[transport]
        self._hops += [_Hop(etp, "everyone")] * (etp.size > 1)

    def announce(
        self, experts: Int[Tensor, "tokens slots"], num_experts: int, bound: int | None = None
    ) -> Send:
        """Begin to say which experts each token goes to; see ``Exchange.announce``."""
        first = self._hops[0].announce(experts, bound if self._static else None)

        def send(x: Tensor, weights: Tensor) -> Callable[[], Arrived]:
            """The first hop, under way; both are of one dtype."""
            route, known = first()
            rows = route.there(x, weights)
            return lambda: self._arrive(route, known, rows, bound)

        return send

    def _arrive(
        self, route: _Route, known: Callable[[], Tensor], rows: Callable[[], Rows], bound: int | None
    ) -> Arrived:
        routes = [route]
        for hop in self._hops[1:]:
            route, onward = hop.announce(known(), bound if self._static else None)()
            known, rows = onward, route.there(*rows())
            routes.append(route)
        here = self._here(known(), bound)
        arrived = arrange(*rows(), here)

        def home(y: Tensor) -> Callable[[], Tensor]:
            """Rows return as they came, and what belongs together is summed."""
            arrive = routes[-1].home(arrived.home(y)())

            def all_home() -> Tensor:
                home = arrive
                for route in reversed(routes[:-1]):
                    home = route.home(home())
                return home()

            return all_home

        return arrived._replace(home=home)

    def _here(self, experts: Tensor, bound: int | None) -> Sorted:
        """Rows that came, in the order of the experts here."""
        if bound is None or not self._static:
            local = experts - self._first
            local = local.masked_fill((local < 0) | (local >= self._per), -1)
            return sort(local, self._per, None if bound is None else bound * self._ranks)
        rows = torch.arange(len(experts), device=experts.device)
        order = rows.view(self._ranks, self._per, bound).transpose(0, 1).flatten()
        back = rows.view(self._per, self._ranks, bound).transpose(0, 1).reshape(-1, 1)
        return Sorted(order, back, [self._ranks * bound] * self._per, True)
