"""Where each copy of a token goes, from what a transport is said to do: no formula, no exchange."""

from collections.abc import Sequence

from weft.plan.dispatch import Dispatch, Transport


def deliveries(transport: Transport, d: Dispatch, source: int, chosen: Sequence[int]):
    """(from, to, slots) of every copy of a token on its way from ``source`` to its experts' ranks.

    ``chosen``: its experts; those of -1 are nowhere.
    """
    size, place = d.ep * d.etp, source % d.etp
    homes = [e // (d.experts // d.ep) * d.etp + place for e in chosen if e >= 0]
    slots = 1 if transport == "all_to_all" else d.top_k
    if transport == "all_gather":
        return [(source, rank, slots) for rank in range(size)]
    even = d.node % d.etp == 0 and size % d.node == 0
    if transport == "all_to_all":
        found = [(source, home, slots) for home in homes]
    elif transport == "per_node" and even:
        relay = {home: home // d.node * d.node + source % d.node for home in set(homes)}
        found = [(source, via, slots) for via in set(relay.values())]
        found += [(via, home, slots) for home, via in relay.items()]
    else:
        found = [(source, home, slots) for home in set(homes)]
    ends = homes if transport == "all_to_all" else set(homes)
    return found + [(end, end - place + p, slots) for end in ends for p in range(d.etp)]
