"""The modules of a run as people read them: where each lies, what it holds, and what that takes of a rank."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from weft.plan.grid import Grid
from weft.plan.layout import Plan
from weft.plan.memory import Memory, memory
from weft.plan.plans import Plans
from weft.plan.table import Row, Table
from weft.spec.count import count_parts, state_of
from weft.spec.modules import DECODER, Module
from weft.spec.param import ParamSpec
from weft.spec.run import RunConfig


def axes_words(grid: Grid) -> str:
    """``dp 4 x tp 2``: the axes that are cut."""
    return " x ".join(f"{axis} {size}" for axis, size in grid.axes if size > 1) or "one rank"


def ranks_words(ranks: Sequence[int]) -> str:
    """``0-3,8``: as settings write them."""
    points = [0, *(i for i, (one, other) in enumerate(pairwise(ranks), 1) if other != one + 1), len(ranks)]
    runs = (ranks[start:stop] for start, stop in pairwise(points))
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def place_words(plan: Plan) -> str:
    """``dp 3 on ranks 1-3``: axes, and ranks where those are not all."""
    grid = plan.dense.grid
    if len(grid.ranks) == plan.world:
        return axes_words(grid)
    return f"{axes_words(grid)} on ranks {ranks_words(grid.ranks)}" if len(grid.ranks) > 1 else _one(grid)


def _one(grid: Grid) -> str:
    return f"rank {grid.ranks[0]}"


def store_words(plan: Plan) -> str:
    """``level 2 over dp``."""
    store = plan.dense.store
    return f"level {store.level}" + (f" over {' x '.join(store.over)}" if store.level else "")


def encoder_rows(run: RunConfig, plans: Plans) -> list[Row]:
    """A row for each encoder."""
    rows = list[Row]()
    for name, plan in plans.encoders.items():
        parameters = sum(count for part, count in _parts(run, name).items() if part != DECODER)
        words = [place_words(plan), f"{parameters:,} parameters"]
        words += [f"store {store_words(plan)}"] if plan.dense.store.level else []
        words += ["projector with the decoder"] if name in run.modules.moved else []
        words += [f"not trained: {frozen}"] if (frozen := _frozen(run, name)) else []
        rows.append((name, ", ".join(words)))
    return rows


def module_table(run: RunConfig, plans: Plans) -> Table:
    """Where each module lies, and the parameters of its parts."""
    head = ("module", "ranks", "axes", "store", "parameters", "projector", "not trained")
    rows = list[Row]()
    for name, plan in plans.all.items():
        parts, projector = _parts(run, name), ""
        if name != DECODER:
            projector = f"{parts[f'{name}.projector']:,}"
            projector += ", with the decoder" if name in run.modules.moved else ""
        rows.append(
            (
                name,
                ranks_words(plan.dense.grid.ranks),
                axes_words(plan.dense.grid),
                store_words(plan),
                f"{parts[DECODER if name == DECODER else f'{name}.body']:,}",
                projector,
                _frozen(run, name),
            )
        )
    return Table("modules", head, tuple(rows))


def _parts(run: RunConfig, module: str) -> dict[str, int]:
    """Parameters of the parts of a module."""
    parts = count_parts(run.modules)
    return {part: count for part, count in parts.items() if part.partition(".")[0] == module}


def _frozen(run: RunConfig, module: str) -> str:
    """``all``, or the parts of a module that are not trained."""
    freeze = run.train.freeze
    parts = list(_parts(run, module))
    found = [part for part in parts if module in freeze or part in freeze]
    return "all" if found == parts else ", ".join(part.rpartition(".")[2] for part in found)


def largest_of_all(run: RunConfig, plans: Plans) -> tuple[int, Memory]:
    """The first rank that needs most, and what it needs; of encoders what rests, not what they work with.

    One rank of each seat, and of each stage of the decoder, is looked at.
    """
    ranks = sorted({*(seat[0] for seat in plans.seats), *plans.decoder.dense.firsts})
    return max(((rank, _memory(run, plans, rank)) for rank in ranks), key=lambda pair: pair[1].total)


def _memory(run: RunConfig, plans: Plans, rank: int) -> Memory:
    """Of one rank."""
    total = Memory()
    for name, plan in plans.of_rank(rank).items():
        module, here = run.modules.all[name], plan.of_rank(rank)
        specs: Sequence[ParamSpec] = module.params
        if name == DECODER:
            own = memory(run, here, rank)
            frozen = DECODER in run.train.freeze
            total += replace(own, gradients=0, master=0, moments=0) if frozen else own
            specs = [spec for spec in specs if spec.name.startswith("projectors.")]
        for spec in specs:
            if here.has(rank, spec.name):
                total += _state(here, module, spec, rank, run.train.precision)
    return total


def _state(plan: Plan, module: Module, spec: ParamSpec, rank: int, precision: str) -> Memory:
    """Bytes that rest of a parameter, as in ``weft.plan.memory``; of a frozen one its weights alone."""
    state, whole = state_of(spec, precision), math.prod(plan.shape(spec, rank))
    if spec.buffer or not module.trains(spec.name):
        return Memory(weights=state.weight * whole)
    cuts, _ = plan.rests(spec, rank)
    level = plan.dense.store.level if cuts > 1 else 0
    cut = -(-whole // cuts)
    own = cut if level in (1, 2) else 0
    return Memory(
        weights=state.weight * (cut if level == 3 else whole),
        gradients=state.gradient * (cut if level >= 2 else whole + own),
        master=state.master * cut + state.weight * own,
        moments=state.moments * cut,
    )
