"""Valid plans that hold every feasible pair of choices; ``python -m tests.parallel.plans`` prints them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, product

from weft.plan.context import attend_refusal, scan_refusal
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, StoreConfig

COUNT = 200  # plans of the sweep on threads
MOST_RANKS = 8
SMALL = 4  # ranks of the plans beyond those that coverage asks for
HEADS = 8  # of attention and Mamba, so that eight ranks can share them


@dataclass(frozen=True)
class Case:
    """One plan and the model and batch it runs.

    ``shares``: whether readers get equal numbers of samples. ``hybrid``: the store cuts over half of dp.
    ``length``: tokens of a sample: even for every grid, uneven, or so few that some ranks have none.
    """

    tp: int
    tp_embed: int
    dp: int
    cp: int
    ep: int
    etp: int
    attend: str
    scan: str
    transport: str
    routing: str
    balance: str
    limited: bool
    jitter: bool
    length: int
    level: int
    hybrid: bool
    microbatches: int
    kv_heads: int
    groups: int
    packed: bool
    mtp: str
    tied: bool
    shares: str
    recompute: bool
    layer: str
    latent: bool

    @property
    def ranks(self) -> int:
        return self.tp * self.tp_embed * self.dp * self.cp

    @property
    def faults(self) -> Iterator[str]:
        """Why this is not a plan."""
        if self.ranks > MOST_RANKS:
            yield f"more than {MOST_RANKS} ranks"
        if self.ranks % (self.ep * self.etp):
            yield "ep x etp does not divide the ranks"
        if self.hybrid and (self.dp % 2 or self.dp < 4):
            yield "a hybrid store needs dp = 4: two ranks that share a copy, and two copies"
        if self.hybrid and self.level == 0:
            yield "level 0 cuts nothing, so there is no part of dp to cut over"
        if self.shares == "unequal" and self.dp == 1:
            yield "one reader reads everything"
        if self.cp == 1 and (self.attend, self.scan) != ("auto", "auto"):
            yield "ranks do not share the tokens of a sample"
        if self.ep * self.etp == 1 and self.transport != "auto":
            yield "every rank has all experts"
        plane = self.tp * self.tp_embed
        heads, kv_heads, groups = (max(1, n // plane) for n in (HEADS, self.kv_heads, self.groups))
        if attend_refusal(self.attend, heads, kv_heads, self.cp) or scan_refusal(
            self.scan, heads, groups, self.cp
        ):
            yield "all_to_all gives every cp rank as many heads"

    @property
    def plan(self) -> PlanConfig:
        store = StoreConfig(level=self.level, shards=2 if self.hybrid else 0)
        axes = {axis: getattr(self, axis) for axis in ("tp", "tp_embed", "dp", "cp", "attend", "scan")}
        experts = ExpertsConfig(ep=self.ep, etp=self.etp, transport=self.transport, node=2 * self.etp)
        return PlanConfig(decoder=LayoutConfig(**axes, store=store), experts=experts)

    @property
    def batch(self) -> tuple[int, int]:
        """Samples of a step, and the most that one forward pass of a reader takes."""
        share = self.microbatches
        return self.dp * share + (self.shares == "unequal"), 1 if self.shares == "equal" else 2

    @property
    def together(self) -> int:
        """Samples of a forward pass of all readers."""
        return min(self.batch[0], self.batch[1] * self.dp)

    @property
    def model(self) -> dict[str, object]:
        """Changes of the tiny model."""
        depths = {"none": 0, "one": 1, "repeated": 2}[self.mtp]
        return {
            "pattern": "M*-E" + ("/*E" if depths else ""),
            "num_attention_heads": HEADS,
            "num_key_value_heads": self.kv_heads,
            "mamba_num_heads": HEADS,
            "mamba_head_dim": 4,
            "n_groups": self.groups,
            "mtp_num_depths": depths,
            "moe_shared_expert_intermediate_size": 24,
            "tie_word_embeddings": self.tied,
            "moe_latent_size": 8 if self.latent else 0,
            "router_batch_aux_loss_coef": 1e-2 * (self.balance == "batch"),
            "router_global_aux_loss_coef": 1e-2 * (self.balance == "global"),
            "moe_jitter": 0.3 * self.jitter,
            **({"n_group": 4, "topk_group": 2} if self.limited else {}),
            **ROUTING[self.routing],
        }


ROUTING: dict[str, dict[str, object]] = {
    "dropless": {},
    "capacity": {"moe_capacity_factor": 1.25, "moe_capacity_tokens": 4, "moe_drop_policy": "position"},
    "sequence": {"moe_capacity_factor": 1.0},
    "padded": {"moe_capacity_factor": 1.0, "moe_capacity_tokens": 5, "moe_pad_to_capacity": True},
}
CHOICES: dict[str, tuple] = {
    "tp": (1, 2, 4),
    "tp_embed": (1, 2),
    "dp": (1, 2, 3, 4),
    "cp": (1, 2, 3, 4),
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "attend": ("auto", "ring", "all_gather", "all_to_all"),
    "scan": ("auto", "states", "all_to_all"),
    "transport": ("auto", "all_gather", "all_to_all", "per_rank", "per_node"),
    "routing": tuple(ROUTING),
    "balance": ("document", "batch", "global"),
    "limited": (False, True),
    "jitter": (False, True),
    "length": (16, 11, 3),
    "level": (0, 1, 2, 3),
    "hybrid": (False, True),
    "microbatches": (1, 2),
    "kv_heads": (8, 2, 1),
    "groups": (8, 4, 2, 1),
    "packed": (False, True),
    "mtp": ("none", "one", "repeated"),
    "tied": (False, True),
    "shares": ("equal", "unequal"),
    "recompute": (False, True),
    "layer": ("mlp", "out_of_tree"),
    "latent": (True, False),
}
AXES = ("tp", "tp_embed", "dp", "cp", "ep", "etp")
Pair = tuple[tuple[str, object], tuple[str, object]]


def pairs(case: Case) -> set[Pair]:
    """Every pair of choices that a case makes."""
    made = [(f.name, getattr(case, f.name)) for f in fields(case)]
    return set(combinations(made, 2))


@cache
def grids(fixed: tuple[tuple[str, object], ...] = ()) -> list[dict[str, int]]:
    """Grids that are small enough and have some axes as given."""
    sizes = (dict(zip(AXES, made, strict=True)) for made in product(*(CHOICES[axis] for axis in AXES)))
    return [
        grid
        for grid in sizes
        if all(grid[axis] == size for axis, size in fixed)
        and (ranks := grid["tp"] * grid["tp_embed"] * grid["dp"] * grid["cp"]) <= MOST_RANKS
        and ranks % (grid["ep"] * grid["etp"]) == 0
    ]


def draw(rng: random.Random, fixed: dict[str, object]) -> Case:
    """A random case with some choices made, on a possible grid if there is one."""
    made = {name: fixed.get(name, rng.choice(values)) for name, values in CHOICES.items()}
    possible = grids(tuple((name, value) for name, value in fixed.items() if name in AXES))
    made |= rng.choice(possible) if possible else {}
    idle = {}
    if made["cp"] == 1:
        idle |= {"attend": "auto", "scan": "auto"}
    if made["ep"] * made["etp"] == 1:
        idle |= {"transport": "auto"}
    if made["dp"] == 1:
        idle |= {"shares": "equal"}
    if made["dp"] < 4 or not made["level"]:
        idle |= {"hybrid": False}
    return Case(**(made | idle | fixed))


@cache
def infeasible() -> dict[Pair, str]:
    """Pairs that no plan has, and why."""
    found: dict[Pair, str] = {}
    for pair in sorted(all_pairs(), key=str):
        rng = random.Random(str(pair))
        reasons: list[set[str]] = []
        for _ in range(400):
            reasons.append(set(draw(rng, dict(pair)).faults))
            if not reasons[-1]:
                break
        else:
            always = set.intersection(*reasons)
            found[pair] = " or ".join(sorted(always or set.union(*reasons)))
    return found


def all_pairs() -> set[Pair]:
    """Every pair of choices, feasible or not."""
    return {((a, x), (b, y)) for a, b in combinations(CHOICES, 2) for x in CHOICES[a] for y in CHOICES[b]}


@cache
def cases(count: int, most_ranks: int = MOST_RANKS) -> tuple[Case, ...]:
    """``count`` plans: those that cover every feasible pair, each the best of many draws, then small ones."""
    rng = random.Random(2)
    left = all_pairs() - set(infeasible())
    chosen: list[Case] = []
    while len(chosen) < count:
        wanted: Pair | tuple[()] = rng.choice(sorted(left, key=str)) if left else ()
        drawn = [case for case in (draw(rng, dict(wanted)) for _ in range(60)) if not any(case.faults)]
        most = most_ranks if left else min(most_ranks, SMALL)
        drawn = [case for case in drawn if case.ranks <= most and case not in chosen]
        if drawn:
            best = max(drawn, key=lambda case: len(pairs(case) & left) / (4 + case.ranks))
            chosen.append(best)
            left -= pairs(best)
        else:
            left -= {wanted}  # needs more ranks than are asked for
    return tuple(chosen)


def report(count: int) -> str:
    """The coverage of so many plans, and what cannot be covered."""
    chosen = cases(count)
    covered = set().union(*(pairs(case) for case in chosen))
    wanted = all_pairs() - set(infeasible())
    lines = [
        f"{len(chosen)} plans; {len(covered & wanted)} of {len(wanted)} feasible pairs of choices covered, "
        f"{len(infeasible())} pairs infeasible:"
    ]
    for ((a, x), (b, y)), reason in infeasible().items():
        lines.append(f"  {a} = {x} with {b} = {y}: {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(COUNT))  # noqa: T201
