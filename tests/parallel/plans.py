"""Valid plans that hold every feasible pair of choices; ``python -m tests.parallel.plans`` prints them."""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, product
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir

from weft.plan.context import attend_refusal, scan_refusal
from weft.plan.pipelines import SPLIT, compute
from weft.plan.placing import complete
from weft.plan.schedule import Action
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, ScheduleConfig, StoreConfig

COUNT = 200  # plans of the sweep on threads
MOST_RANKS = 8
SMALL = 4  # ranks of the plans beyond those that coverage asks for
HEADS = 8  # of attention and Mamba, so that eight ranks can share them


@dataclass(frozen=True)
class Case:
    """One plan and the model and batch it runs.

    ``shares``: whether readers get equal numbers of samples. ``hybrid``: the store cuts over half of dp.
    ``length``: tokens of a sample: even for every grid, uneven, or so few that some ranks have none.
    ``sizes``: whether pipeline ranks have the same tp. ``cut``: stages of even cost, or as uneven as can be.
    ``resident``: whether activations go out to the host.
    """

    pp: int
    kind: str
    sizes: str
    cut: str
    gather: str
    resident: bool
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
    def stage(self) -> int:
        """Ranks of a pipeline rank."""
        return self.tp * self.tp_embed * self.dp * self.cp

    @property
    def ranks(self) -> int:
        return self.stage * self.pp

    @property
    def stages(self) -> int:
        return self.pp * (2 if self.kind in ("interleaved", "zbv") else 1)

    @property
    def table(self) -> bool:
        """Whether the last stage reads the token table."""
        return self.tied or self.mtp != "none"

    @property
    def faults(self) -> Iterator[str]:
        """Why this is not a plan."""
        yield from self._layout_faults
        yield from self._schedule_faults

    @property
    def _schedule_faults(self) -> Iterator[str]:
        alone = ("1f1b", "even", "unit", False)
        if self.pp == 1 and (self.kind, self.cut, self.gather, self.resident) != alone:
            yield "there is one pipeline rank"
        if self.sizes == "differ" and (self.pp == 1 or self.tp == 1 or (self.table and self.pp == 2)):
            yield "pipeline ranks differ in tp if there are several, but not in who has the token table"
        if self.gather == "stage" and self.level < 2:
            yield "below level 2 nothing is gathered or reduced by stage"
        if self.resident and self.parts < 2:
            yield "activations go out where there are several microbatches"

    @property
    def _layout_faults(self) -> Iterator[str]:
        if self.ranks > MOST_RANKS:
            yield f"more than {MOST_RANKS} ranks"
        if self.stage % (self.ep * self.etp):
            yield "ep x etp does not divide the ranks of a stage"
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
        axes = {axis: getattr(self, axis) for axis in ("pp", "tp", "tp_embed", "dp", "cp", "attend", "scan")}
        if self.sizes == "differ":
            half = [self.tp // 2] * (self.pp - 1)
            axes |= {"dp": 0, "tp_of_stages": (self.tp, *half[1:], self.tp if self.table else half[0])}
        experts = ExpertsConfig(ep=self.ep, etp=self.etp, transport=self.transport, node=2 * self.etp)
        return PlanConfig(decoder=LayoutConfig(**axes, store=store), experts=experts, schedule=self.schedule)

    @property
    def schedule(self) -> ScheduleConfig:
        pattern, stages = len(self.pattern), self.stages
        uneven = (*([1] * (stages - 1)), pattern - stages + 1)  # ends with the head, and has most layers
        return ScheduleConfig(
            kind=self.kind,
            layers=uneven if self.cut == "uneven" else (),
            file=_file(self.pp, self.parts) if self.kind == "file" else "",
            gather=self.gather,
            resident=self.fewest if self.resident else 0,
        )

    @property
    def fewest(self) -> int:
        """The fewest microbatches whose activations a rank must keep on the device."""
        kind = "gpipe" if self.kind == "file" else self.kind
        graph, lists = compute(kind, self.pp, self.stages // self.pp, self.parts)
        for resident in range(1, 99):
            with suppress(ValueError):
                complete(graph, lists, resident=resident, split=kind in SPLIT)
                return resident
        raise AssertionError

    @property
    def parts(self) -> int:
        """Microbatches of a step."""
        return -(-self.batch[0] // self.together)

    @property
    def pattern(self) -> str:
        """Of the main layers: at least one for each stage."""
        return "M*-E" * -(-self.stages // 4)

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
            "pattern": self.pattern + ("/*E" if depths else ""),
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
KINDS = ("1f1b", "gpipe", "interleaved", "zero_bubble", "zbv", "file")
CHOICES: dict[str, tuple] = {
    "pp": (1, 2, 3, 4),
    "kind": KINDS,
    "sizes": ("same", "differ"),
    "cut": ("even", "uneven"),
    "gather": ("unit", "stage"),
    "resident": (False, True),
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
    "microbatches": (1, 2, 3),
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
AXES = ("pp", "tp", "tp_embed", "dp", "cp", "ep", "etp")
Pair = tuple[tuple[str, object], tuple[str, object]]


def pairs(case: Case) -> set[Pair]:
    """Every pair of choices that a case makes."""
    made = [(f.name, getattr(case, f.name)) for f in fields(case)]
    return set(combinations(made, 2))


def _file(ranks: int, parts: int) -> str:
    """All forward passes, then all backward passes from the last microbatch to the first."""
    lists = compute("gpipe", ranks, 1, parts)[1]
    lines = (" ".join(map(str, (*actions[:parts], *_backwards(actions[parts:])))) for actions in lists)
    path = Path(gettempdir()) / f"weft_lists_{ranks}_{parts}.txt"
    with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:  # others may read it meanwhile
        file.write("\n".join(lines) + "\n")
    Path(file.name).replace(path)
    return str(path)


def _backwards(actions: Sequence[Action]) -> Iterator[Action]:
    """B and W of the last microbatch first."""
    pairs = zip(actions[::2], actions[1::2], strict=True)
    return (action for pair in reversed(list(pairs)) for action in pair)


@cache
def grids(fixed: tuple[tuple[str, object], ...] = ()) -> list[dict[str, int]]:
    """Grids that are small enough and have some axes as given."""
    sizes = (dict(zip(AXES, made, strict=True)) for made in product(*(CHOICES[axis] for axis in AXES)))
    return [
        grid
        for grid in sizes
        if all(grid[axis] == size for axis, size in fixed)
        and (stage := grid["tp"] * grid["tp_embed"] * grid["dp"] * grid["cp"]) * grid["pp"] <= MOST_RANKS
        and stage % (grid["ep"] * grid["etp"]) == 0
    ]


def draw(rng: random.Random, fixed: dict[str, object]) -> Case:
    """A random case with some choices made, on a possible grid if there is one."""
    made = {name: fixed.get(name, rng.choice(values)) for name, values in CHOICES.items()}
    possible = grids(tuple((name, value) for name, value in fixed.items() if name in AXES))
    if fixed.get("sizes") == "differ":
        possible = [grid for grid in possible if grid["pp"] > 1 and grid["tp"] > 1]
    made |= rng.choice(possible) if possible else {}
    return Case(**(made | dict(_idle(made)) | fixed))


def _idle(made: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Choices that the others leave no room for."""
    alone = {"kind": "1f1b", "sizes": "same", "cut": "even", "gather": "unit", "resident": False}
    rules = [
        (made["pp"] == 1, alone),
        (made["tp"] == 1, {"sizes": "same"}),
        (made["level"] < 2, {"gather": "unit"}),
        (made["microbatches"] == 1, {"resident": False}),
        (made["sizes"] == "differ" and made["pp"] == 2, {"tied": False, "mtp": "none"}),
        (made["cp"] == 1, {"attend": "auto", "scan": "auto"}),
        (made["ep"] * made["etp"] == 1, {"transport": "auto"}),
        (made["dp"] == 1, {"shares": "equal"}),
        (made["dp"] < 4 or not made["level"], {"hybrid": False}),
    ]
    return (item for holds, choices in rules if holds for item in choices.items())


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
        drawn = [case for case in (draw(rng, dict(wanted)) for _ in range(100)) if not any(case.faults)]
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
