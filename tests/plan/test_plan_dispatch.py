"""Bytes of dispatch against routing that is played token by token, and the choice that follows."""

import random
from itertools import combinations
from math import comb

import pytest

from tests.plan.deliveries import deliveries
from weft.plan.dispatch import RATIO, TRANSPORTS, Dispatch, Link, Transport, choose, touched, traffic


def choices(d: Dispatch) -> list[tuple[int, ...]]:
    """Sets of experts, as likely as one another: all there are, or many of them."""
    group = d.experts // d.expert_groups
    if d.expert_groups == 1 and comb(d.experts, d.top_k) <= 200:
        return list(combinations(range(d.experts), d.top_k))
    draw, found = random.Random(0), []
    for _ in range(100):
        used = draw.sample(range(d.expert_groups), d.top_groups)
        pool = [g * group + e for g in used for e in range(group)]
        found.append(tuple(draw.sample(pool, d.top_k)))
    return found


def played(transport: Transport, d: Dispatch, sets: list[tuple[int, ...]]) -> tuple[Link, Link]:
    """Bytes of one rank's tokens: hidden states one way, and a step without counts of rows."""
    hidden, rest = [0.0, 0.0], [0.0, 0.0]
    size = d.ep * d.etp
    sources = range(0, size, max(1, size // 8 - 1))  # at several places of nodes and of etp
    for source in sources:
        for chosen in sets:
            for start, end, slots in deliveries(transport, d, source, chosen):
                if start != end:
                    far = start // d.node != end // d.node
                    hidden[far] += d.width * d.element
                    rest[far] += slots * (2 * d.element + 4)
    scale = d.tokens / (len(sets) * len(sources))
    one_way = Link(*(scale * n for n in hidden))
    return one_way, Link(*(4 * n + scale * m for n, m in zip(one_way, rest, strict=True)))


# width, top_k, experts, groups of experts, groups of a token, ep, etp, ranks of a node
TABLE: dict[tuple[int, ...], Transport] = {
    (16, 4, 64, 1, 1, 1, 2, 4): "all_gather",
    (16, 4, 64, 1, 1, 8, 2, 4): "per_node",
    (16, 4, 64, 1, 1, 16, 2, 4): "all_to_all",
    (16, 4, 64, 1, 1, 16, 4, 4): "all_to_all",
    (16, 4, 64, 1, 1, 16, 4, 8): "all_to_all",
    (16, 4, 64, 1, 1, 32, 1, 4): "all_to_all",
    (16, 4, 64, 1, 1, 32, 2, 4): "all_to_all",
    (16, 4, 64, 1, 1, 32, 2, 8): "all_to_all",
    (16, 4, 64, 1, 1, 64, 1, 4): "all_to_all",
    (16, 4, 64, 1, 1, 64, 1, 8): "all_to_all",
    (32, 4, 64, 1, 1, 1, 4, 8): "all_gather",
    (32, 4, 64, 1, 1, 8, 1, 4): "per_node",
    (32, 4, 64, 1, 1, 8, 4, 8): "per_node",
    (32, 4, 64, 1, 1, 32, 2, 4): "all_to_all",
    (32, 4, 64, 1, 1, 64, 1, 4): "all_to_all",
    (64, 8, 64, 1, 1, 8, 1, 4): "per_node",
    (64, 8, 64, 1, 1, 8, 1, 8): "per_rank",
    (128, 22, 512, 1, 1, 16, 2, 4): "per_node",
    (128, 22, 512, 1, 1, 16, 4, 4): "per_rank",
    (512, 3, 4, 1, 1, 1, 4, 4): "all_gather",
    (512, 3, 4, 1, 1, 1, 4, 8): "all_gather",
    (512, 3, 4, 1, 1, 2, 1, 4): "all_gather",
    (512, 4, 32, 1, 1, 2, 1, 8): "per_rank",
    (512, 4, 32, 1, 1, 4, 1, 8): "per_rank",
    (512, 4, 32, 1, 1, 4, 4, 4): "per_rank",
    (512, 4, 32, 1, 1, 32, 2, 8): "per_node",
    (1024, 12, 16, 1, 1, 1, 2, 8): "all_gather",
    (1024, 12, 16, 1, 1, 2, 1, 4): "all_gather",
    (1024, 12, 16, 1, 1, 16, 4, 8): "per_node",
    (1024, 22, 512, 1, 1, 4, 2, 4): "per_node",
    (1344, 6, 128, 1, 1, 1, 4, 4): "all_gather",
    (1344, 6, 128, 1, 1, 4, 4, 4): "per_rank",
    (1344, 6, 128, 1, 1, 8, 2, 8): "per_node",
    (1344, 6, 128, 1, 1, 32, 2, 8): "per_node",
    (2048, 6, 8, 1, 1, 1, 2, 8): "all_gather",
    (2048, 6, 8, 1, 1, 2, 1, 4): "all_gather",
    (2048, 6, 8, 1, 1, 2, 1, 8): "all_gather",
    (2048, 8, 128, 1, 1, 16, 1, 4): "per_node",
    (3584, 8, 64, 1, 1, 4, 2, 4): "per_node",
    (3584, 8, 64, 1, 1, 64, 1, 4): "per_node",
    (4096, 1, 16, 1, 1, 8, 1, 4): "all_to_all",
    (4096, 1, 16, 1, 1, 8, 2, 4): "all_to_all",
    (4096, 2, 16, 1, 1, 2, 1, 4): "per_rank",
    (4096, 2, 16, 1, 1, 4, 1, 4): "per_rank",
    (4096, 2, 64, 1, 1, 2, 4, 4): "per_rank",
    (4096, 2, 64, 1, 1, 4, 2, 8): "per_rank",
    (4096, 4, 4, 1, 1, 2, 1, 4): "all_gather",
    (4096, 4, 4, 1, 1, 2, 1, 8): "all_gather",
    (5120, 6, 160, 8, 3, 2, 4, 4): "per_rank",
    (5120, 6, 160, 8, 3, 4, 2, 8): "per_rank",
    (5120, 6, 160, 8, 3, 4, 4, 4): "per_rank",
    (5120, 6, 160, 8, 3, 32, 2, 4): "per_node",
    (6144, 2, 8, 1, 1, 4, 1, 8): "per_rank",
    (7168, 8, 256, 1, 1, 4, 4, 4): "per_rank",
    (7168, 8, 256, 1, 1, 16, 2, 4): "per_node",
    (7168, 8, 256, 8, 4, 1, 2, 4): "all_gather",
    (7168, 8, 256, 8, 4, 2, 2, 4): "per_rank",
    (7168, 8, 256, 8, 4, 32, 1, 8): "per_node",
    (8192, 1, 128, 1, 1, 4, 1, 4): "all_to_all",
    (8192, 1, 128, 1, 1, 4, 4, 4): "all_to_all",
    (8192, 1, 128, 1, 1, 16, 2, 8): "all_to_all",
    (2048, 3, 12, 1, 1, 12, 1, 8): "all_to_all",
}


def of(row: tuple[int, ...]) -> Dispatch:
    width, top_k, experts, expert_groups, top_groups, ep, etp, node = row
    return Dispatch(1024, width, top_k, experts, ep, etp, node, 2, expert_groups, top_groups)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_cheapest_is_chosen(row):
    """Costs of routing that is played; a tie goes to the simpler transport, which is named first."""
    d = of(row)
    sets = choices(d)
    games = {transport: played(transport, d, sets) for transport in TRANSPORTS}
    costs = {transport: step.cost(RATIO) for transport, (_, step) in games.items()}
    cheapest = next(t for t in TRANSPORTS if costs[t] <= min(costs.values()) * (1 + 1e-9))
    assert choose(d) == TABLE[row] == cheapest
    for transport, (hidden, _) in games.items():
        found = tuple(traffic(transport, d).hidden)
        assert found == pytest.approx(tuple(hidden), rel=0.05, abs=0.02 * sum(hidden)), transport


def test_the_table_is_wide():
    assert len(TABLE) >= 50
    assert set(TABLE.values()) == set(TRANSPORTS)


@pytest.mark.parametrize("ep", [2, 4, 8, 16, 64])
def test_all_gather_against_all_to_all(ep):
    """One node, no cut of the inner width: all_gather moves fewer hidden bytes just where ep < top_k."""
    d = Dispatch(1024, 4096, 8, 64, ep, node=ep)
    gathered, exchanged = (traffic(t, d).hidden.inside for t in ("all_gather", "all_to_all"))
    assert (gathered < exchanged) == (ep < 8)


def test_known_figures():
    """Published D (64 top-8, Mixtral, 256 top-8) and the terms of one rank, by hand."""
    known = {(64, 4, 8): 3.66, (64, 8, 8): 5.43, (64, 16, 8): 6.75, (64, 32, 8): 7.56}
    known |= {(8, 4, 2): 1.86, (8, 8, 2): 2.0, (256, 8, 8): 5.29, (256, 64, 8): 7.68}
    for shape, want in known.items():
        assert touched(*shape) == pytest.approx(want, abs=0.005)
    d = Dispatch(tokens=10, width=16, top_k=2, experts=8, ep=8, etp=2, node=8)
    gathered = traffic("all_gather", d)
    assert gathered.hidden == Link(7 * 10 * 32, 8 * 10 * 32)
    assert gathered.weights == Link(7 * 10 * 4, 8 * 10 * 4)
    assert gathered.metadata == Link(7 * (10 * 8 + 8), 8 * (10 * 8 + 8))
    exchanged = traffic("all_to_all", d)
    assert exchanged.hidden == Link((3 * 2.5 + 20) * 32, 4 * 2.5 * 32)
    assert exchanged.forward == Link(27.5 * (64 + 2 + 4) + 4 * 8, 10 * (64 + 2 + 4) + 4 * 8)


def test_groups_limit_how_far_a_token_goes():
    """One group of experts on each of eight ranks: exactly the used groups are touched by enough experts."""
    assert touched(64, 8, 16, expert_groups=8, top_groups=2) == 2.0
    assert touched(64, 8, 8, expert_groups=8, top_groups=8) == pytest.approx(touched(64, 8, 8))
    hits = [  # ranges of three experts across groups of four
        len({e // 3 for e in chosen})
        for used in combinations(range(3), 2)
        for chosen in combinations([4 * g + e for g in used for e in range(4)], 3)
    ]
    assert touched(12, 4, 3, expert_groups=3, top_groups=2) == pytest.approx(sum(hits) / len(hits))
