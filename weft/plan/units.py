"""The distinct units of a model, and what one rank of a plan holds of each.

Layers that are alike are one unit with many names, so that large models are as quick to plan.
"""

from dataclasses import dataclass
from functools import lru_cache

from weft.plan.grid import Grid
from weft.plan.layout import Plan
from weft.spec.hybrid import BlockConfig, HybridConfig
from weft.spec.param import ParamSpec


@dataclass(frozen=True)
class Unit:
    """Parts of a model that are alike.

    Attributes:
        kind: what they are, for people.
        names: of all of them, as in the names of parameters.
        specs: parameters of one of them, names without the unit's.
        block: the residual layer, where they are layers.
    """

    kind: str
    names: tuple[str, ...]
    specs: tuple[ParamSpec, ...]
    block: BlockConfig | None = None

    def at(self, plan: Plan, position: int) -> int:
        """How many of them a pipeline rank holds."""
        return sum(position in plan.positions(name) for name in self.names)


@lru_cache(maxsize=16)
def units(model: HybridConfig) -> tuple[Unit, ...]:
    """Every distinct unit, in the order of the model: table, layers, final norm, head, MTP depths."""
    alike: dict[BlockConfig, list[str]] = {}
    for i, block in enumerate(model.blocks):
        alike.setdefault(block, []).append(f"layers.{i}")
    for i, depth in enumerate(model.mtp):
        for j, block in enumerate(depth.blocks):
            alike.setdefault(block, []).append(f"mtp.{i}.layers.{j}")
    found = [Unit("token table", ("embed",), model.embedding.params())]
    for block, names in alike.items():
        kind = type(block.mixer).__name__.removesuffix("Config")
        found.append(Unit(f"{kind} layer", tuple(names), block.params(), block))
    found.append(Unit("final norm", ("norm",), model.norm.params()))
    if not model.tie_word_embeddings:
        found.append(Unit("head", ("head",), model.embedding.params()))
    if model.mtp:
        own = tuple(spec for spec in model.mtp[0].params() if not spec.name.startswith("layers."))
        found.append(Unit("MTP joint", tuple(f"mtp.{i}" for i in range(len(model.mtp))), own))
    return tuple(found)


def same_stages(outer: Grid, inner: Grid) -> bool:
    """Whether every stage of two nested grids has the same ranks."""
    pp = inner.size("pp")
    if outer.size("pp") != pp or len(outer.ranks) != len(inner.ranks):
        return False
    length = len(outer.ranks) // pp
    cuts = [slice(stage * length, (stage + 1) * length) for stage in range(pp)]
    return all(set(outer.ranks[cut]) == set(inner.ranks[cut]) for cut in cuts)
