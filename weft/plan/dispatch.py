"""Bytes of expert dispatch for every transport, and the cheapest one.

The transports are those of ``weft.parallel.dispatch``. Volumes are bytes that one rank receives for one
layer, means over balanced routing: each set of ``top_k`` experts that the group limit allows is as likely as
any other. T tokens of width w on each of ep * etp ranks, k experts of each token, m nodes with i ranks of ep
each; D(n) is the mean number of n equal ranges of experts in which a token's experts lie. Hidden states, one
way:

    all_gather  (ep etp - 1) T w
    all_to_all  k T w (ep - 1) / ep                             + (etp - 1) k T w
    per_rank    D(ep) T w (ep - 1) / ep                         + (etp - 1) D(ep) T w
    per_node    D(m) T w (m - 1) / m + D(ep) T w (i - 1) / i    + (etp - 1) D(ep) T w

Each row also brings its routing weights and, ahead of it, its expert numbers.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Literal, NamedTuple

Transport = Literal["all_gather", "all_to_all", "per_rank", "per_node"]
TRANSPORTS: tuple[Transport, ...] = ("all_gather", "all_to_all", "per_rank", "per_node")

RATIO = 450 / 50
"""Cost of a byte between nodes in bytes inside one: NVLink has 450 GB/s, InfiniBand 50 GB/s for each GPU."""

COUNT, NUMBER = 8, 4  # bytes of a row count and of an expert number


class Groups(NamedTuple):
    """Groups of one rank among ep * etp ranks that lie side by side, etp inside; places, not world ranks.

    Attributes:
        whole: all of them.
        ep: one for each range of experts.
        etp: the same experts, one for each part of their inner width.
        nodes: one of each node, at the same place there.
        inside: those of ``ep`` on the same node.
    """

    whole: range
    ep: range
    etp: range
    nodes: range
    inside: range


def groups(rank: int, size: int, etp: int, node: int) -> Groups:
    """Groups of ``rank`` of ``size``. Nodes that do not cut the ranks into equal parts count as one."""
    step = node if node % etp == 0 and size % node == 0 else size
    place, first = rank % etp, rank - rank % step
    return Groups(
        whole=range(size),
        ep=range(place, size, etp),
        etp=range(rank - place, rank - place + etp),
        nodes=range(rank % step, size, step),
        inside=range(first + place, first + step, etp),
    )


class Link(NamedTuple):
    """Bytes that a rank receives from its own node and from others."""

    inside: float
    between: float

    def cost(self, ratio: float = RATIO) -> float:
        """In bytes inside a node."""
        return self.inside + ratio * self.between


@dataclass(frozen=True)
class Dispatch:
    """One layer of routed experts on a grid of ranks.

    Attributes:
        tokens: of one rank, before dispatch.
        width: in which experts read and write (the latent width, where there is one).
        top_k: experts of one token.
        experts: routed experts, a multiple of ``ep``.
        ep: ranks over which the experts are cut.
        etp: ranks over which each expert's inner width is cut.
        node: ranks of one node; the ep * etp ranks lie side by side, etp inside, from a node's first rank on.
        element: bytes of one number of the hidden state.
        expert_groups: groups of experts.
        top_groups: groups that one token may use.
    """

    tokens: int
    width: int
    top_k: int
    experts: int
    ep: int
    etp: int = 1
    node: int = 8
    element: int = 2
    expert_groups: int = 1
    top_groups: int = 1

    def touched(self, parts: int) -> float:
        """Mean number of ``parts`` equal ranges of experts in which a token's experts lie."""
        return touched(self.experts, parts, self.top_k, self.expert_groups, self.top_groups)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives for one layer.

    Attributes:
        hidden: hidden states, one way: of dispatch, and again of combine; the backward pass has both again.
        weights: routing weights in dispatch; as much again for their gradients.
        metadata: counts and expert numbers, once.
    """

    hidden: Link
    weights: Link
    metadata: Link

    @property
    def forward(self) -> Link:
        """Dispatch and combine."""
        return _sum((2, self.hidden), (1, self.weights), (1, self.metadata))

    @property
    def step(self) -> Link:
        """Forward and backward."""
        return _sum((4, self.hidden), (2, self.weights), (1, self.metadata))


def _sum(*terms: tuple[float, Link]) -> Link:
    return Link(sum(n * link.inside for n, link in terms), sum(n * link.between for n, link in terms))


def touched(experts: int, parts: int, top_k: int, expert_groups: int = 1, top_groups: int = 1) -> float:
    """Mean number of ``parts`` equal ranges of experts that hold one of a token's ``top_k`` experts.

    Exact (hypergeometric) where any ``top_groups`` groups, and any ``top_k`` experts of these, are as likely
    as any others. Without groups: ``parts * (1 - C(E - E / parts, k) / C(E, k))``.
    """
    per, group = experts // parts, experts // expert_groups
    mean = 0.0
    for first in range(0, experts, per):
        own = range(first, first + per)
        shared = [
            min(own.stop, start + group) - max(own.start, start)
            for start in range(first // group * group, own.stop, group)
        ]
        mean += 1 - _untouched(tuple(shared), top_k, group, expert_groups, top_groups)
    return mean


@lru_cache(maxsize=1024)
def _untouched(shared: tuple[int, ...], top_k: int, group: int, expert_groups: int, top_groups: int) -> float:
    """Probability that no expert is chosen of a range that has ``shared`` experts of some groups."""
    ways = {(0, 0): 1}  # (groups of ``shared`` that are used, experts of the range in them) -> how often
    for experts in shared:
        used = {(n + 1, have + experts): count for (n, have), count in ways.items()}
        ways = {key: ways.get(key, 0) + used.get(key, 0) for key in {**ways, **used}}
    pool, others = top_groups * group, expert_groups - len(shared)
    misses = sum(
        count * comb(others, top_groups - n) * comb(pool - have, top_k)
        for (n, have), count in ways.items()
        if n <= top_groups
    )
    return misses / (comb(expert_groups, top_groups) * comb(pool, top_k))


def traffic(transport: Transport, d: Dispatch) -> Traffic:
    """Mean bytes under balanced routing."""
    size = d.ep * d.etp
    one = groups(0, size, d.etp, d.node)
    nodes, inside = len(one.nodes), len(one.inside)
    single = transport == "all_to_all"
    there = d.tokens * (d.top_k if single else d.touched(d.ep))  # rows that a rank has for its experts
    relayed = d.tokens * d.touched(nodes)
    hops: list[tuple[str, float]] = {  # a group, and rows from each of its members
        "all_gather": [("whole", d.tokens)],
        "all_to_all": [("ep", there / d.ep), ("etp", there)],
        "per_rank": [("ep", there / d.ep), ("etp", there)],
        "per_node": [("nodes", relayed / nodes), ("inside", there / inside), ("etp", there)],
    }[transport]
    slots = 1 if single else d.top_k
    peers = [(_peers(name, size, d.etp, d.node), rows) for name, rows in hops]
    rows = _sum(*((count, link) for link, count in peers))
    return Traffic(
        hidden=_sum((d.width * d.element, rows)),
        weights=_sum((slots * d.element, rows)),
        metadata=_sum((slots * NUMBER, rows), *((COUNT, link) for link, _ in peers)),
    )


@lru_cache(maxsize=1024)
def _peers(name: str, size: int, etp: int, node: int) -> Link:
    """Other members of a rank's group on its node and elsewhere, a mean over all ranks."""
    near = far = 0
    for rank in range(size):
        members: range = getattr(groups(rank, size, etp, node), name)
        before = rank - rank % node
        here = len(_from(members, before)) - len(_from(members, before + node)) - 1
        near += here
        far += len(members) - 1 - here
    return Link(near / size, far / size)


def _from(members: range, start: int) -> range:
    """Members from ``start`` on."""
    return members[max(0, -(-(start - members.start) // members.step)) :]


def choose(d: Dispatch, ratio: float = RATIO) -> Transport:
    """The transport whose forward and backward pass cost least; of equal ones the simplest.

    Args:
        d: the layer.
        ratio: cost of a byte between nodes in bytes inside one.
    """
    costs = {transport: traffic(transport, d).step.cost(ratio) for transport in TRANSPORTS}
    least = min(costs.values()) * (1 + 1e-9)
    return next(transport for transport in TRANSPORTS if costs[transport] <= least)
