"""Valid plans that hold every feasible pair of choices; ``python -m tests.parallel.plans`` prints them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations

from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig

COUNT = 200  # plans of the sweep on threads
MOST_RANKS = 8
SMALL = 4  # ranks of the plans beyond those that coverage asks for


@dataclass(frozen=True)
class Case:
    """One plan and the model and batch it runs.

    ``shares``: whether readers get equal numbers of samples. ``hybrid``: the store cuts over half of dp.
    """

    tp: int
    tp_embed: int
    dp: int
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
        return self.tp * self.tp_embed * self.dp

    @property
    def faults(self) -> Iterator[str]:
        """Why this is not a plan."""
        if self.ranks > MOST_RANKS:
            yield f"more than {MOST_RANKS} ranks"
        if self.hybrid and (self.dp % 2 or self.dp < 4):
            yield "a hybrid store needs dp = 4: two ranks that share a copy, and two copies"
        if self.hybrid and self.level == 0:
            yield "level 0 cuts nothing, so there is no part of dp to cut over"
        if self.shares == "unequal" and self.dp == 1:
            yield "one reader reads everything"

    @property
    def plan(self) -> PlanConfig:
        store = StoreConfig(level=self.level, shards=2 if self.hybrid else 0)
        return PlanConfig(decoder=LayoutConfig(tp=self.tp, tp_embed=self.tp_embed, dp=self.dp, store=store))

    @property
    def batch(self) -> tuple[int, int]:
        """Samples of a step, and the most that one forward pass of a reader takes."""
        share = self.microbatches
        return self.dp * share + (self.shares == "unequal"), 1 if self.shares == "equal" else 2

    @property
    def model(self) -> dict[str, object]:
        """Changes of the tiny model: 8 heads, so that eight ranks can share them."""
        depths = {"none": 0, "one": 1, "repeated": 2}[self.mtp]
        return {
            "pattern": "M*-E" + ("/*E" if depths else ""),
            "num_attention_heads": 8,
            "num_key_value_heads": self.kv_heads,
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": self.groups,
            "mtp_num_depths": depths,
            "moe_shared_expert_intermediate_size": 24,
            "tie_word_embeddings": self.tied,
            "moe_latent_size": 8 if self.latent else 0,
        }


CHOICES: dict[str, tuple] = {
    "tp": (1, 2, 4),
    "tp_embed": (1, 2),
    "dp": (1, 2, 3, 4),
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
Pair = tuple[tuple[str, object], tuple[str, object]]


def pairs(case: Case) -> set[Pair]:
    """Every pair of choices that a case makes."""
    made = [(f.name, getattr(case, f.name)) for f in fields(case)]
    return set(combinations(made, 2))


def draw(rng: random.Random, fixed: dict[str, object]) -> Case:
    """A random case with some choices made."""
    return Case(**{name: fixed.get(name, rng.choice(values)) for name, values in CHOICES.items()})


@cache
def infeasible() -> dict[Pair, str]:
    """Pairs that no plan has, and why."""
    found: dict[Pair, str] = {}
    for a, b in combinations(CHOICES, 2):
        for x in CHOICES[a]:
            for y in CHOICES[b]:
                rng = random.Random(f"{a}{x}{b}{y}")
                reasons = [set(draw(rng, {a: x, b: y}).faults) for _ in range(400)]
                if all(reasons):
                    always = set.intersection(*reasons)
                    found[(a, x), (b, y)] = " or ".join(sorted(always or set.union(*reasons)))
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
            best = max(drawn, key=lambda case: len(pairs(case) & left))
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
