"""A plan as people read it: who holds what, as tables, as a grid of ranks in text, and as SVG."""

from collections.abc import Iterator, Mapping, Sequence

from weft.plan.dispatch import Link
from weft.plan.exchanges import exchanges
from weft.plan.forecast import pipeline_tables, pipelined, schedule_row
from weft.plan.grid import Grid
from weft.plan.layout import Plan, of_experts
from weft.plan.memory import Memory, largest
from weft.plan.modules_table import (
    axes_words,
    encoder_rows,
    largest_of_all,
    module_table,
    place_words,
    store_words,
)
from weft.plan.plans import plans_of_run
from weft.plan.shard import SHARED, Plane
from weft.plan.table import Row, Table, bytes_words
from weft.plan.units import Unit, units
from weft.spec.param import Dim, ParamSpec
from weft.spec.run import RunConfig

_ROWS, _COLUMNS, _GROUPS = 6, 8, 3  # the most of each that are written out
_INNER = {"tp", "tp_embed", "ep", "etp"}  # axes that are columns of the picture


def show(run: RunConfig, plan: Plan) -> list[Table]:
    """Everything about a plan that fits: grids and their pictures, units, memory."""
    tables: list[Table] = []
    plans = plans_of_run(run, plan.world)
    for role, grid in (*((name, one.dense.grid) for name, one in plans.encoders.items()), *_grids(plan)):
        rows = tuple(_axis_rows(grid))
        tables.append(
            Table(f"{role}: {_ranks(grid)}", ("axis", "size", "groups", "ranks") if rows else (), rows)
        )
        tables += [picture(grid)] if rows else []
    head = ("unit", "parameter", "shape", "cut", "here", "copies")
    held_rows = tuple(row for unit in units(run.model) for row in _unit_rows(plan, unit))
    title = "parameters" if plan.world == 1 else "parameters, as the first rank of their stage holds them"
    tables.append(Table(title, head, held_rows))
    rows = tuple(_exchange_row(*exchange) for exchange in exchanges(run, plan))
    if rows:
        head = ("layer", "setting", "form", "received", "other forms")
        title = "exchanges of a layer, by a rank for one microbatch, forward and backward (a mean)"
        tables.append(Table(title, head, rows))
    told = pipelined(run, plan)
    tables += [module_table(run, plans)] if run.encoders else []
    tables += pipeline_tables(run.model, told) if told else []
    return [*tables, memory_table(*_largest(run, plan), plan.world, _estimated(run))]


def _largest(run: RunConfig, plan: Plan) -> tuple[int, Memory]:
    """The rank that needs most, with what encoders need to rest."""
    return largest_of_all(run, plans_of_run(run, plan.world)) if run.encoders else largest(run, plan)


def _estimated(run: RunConfig) -> str:
    """What activations are counted of."""
    return "estimate, the decoder's" if run.encoders else "estimate"


def _grids(plan: Plan) -> Iterator[tuple[str, Grid]]:
    """Roles and their grids; where pipeline ranks differ, those of each."""
    plans = plan.of_stages or (plan,)
    roles = {"decoder": [one.dense.grid for one in plans], "experts": [one.experts.grid for one in plans]}
    for role, grids in roles.items():
        if not plan.of_stages:
            yield role, grids[0]
            continue
        for position, grid in enumerate(grids):
            length = len(grid.ranks) // grid.size("pp")
            own = grid.ranks[position * length : (position + 1) * length]
            axes = tuple(pair for pair in grid.axes if pair[0] != "pp")
            yield f"{role} of pipeline rank {position}", Grid(own, axes)


def _exchange_row(
    layer: str, setting: str, form: str, received: Mapping[str, Link], refused: Mapping[str, str]
) -> Row:
    def words(link: Link) -> str:
        between = f" ({bytes_words(round(link.between))} between nodes)" if link.between else ""
        return bytes_words(round(sum(link))) + between

    others = [f"{name} {words(link)}" for name, link in received.items() if name != form]
    others += [f"{name}: not possible" for name in refused if name != form]
    return layer, setting, form, words(received[form]), ", ".join(others)


def summary(run: RunConfig, plan: Plan) -> Table:
    """The plan in a few rows."""
    rank, need = _largest(run, plan)
    state, rest = bytes_words(need.state), bytes_words(need.total - need.state)
    mixtures = any(of_experts(spec) for unit in units(run.model) for spec in unit.specs)
    rows = [("ranks", f"{plan.world:,}")]
    rows += encoder_rows(run, plans_of_run(run, plan.world)) if run.encoders else []
    roles = [(role, axes_words(grid)) for role, grid in _grids(plan) if mixtures or "decoder" in role]
    if run.encoders and not plan.of_stages:
        roles[0] = "decoder", place_words(plan)
    rows += roles
    told = pipelined(run, plan)
    rows += [schedule_row(told)] if told else []
    rows.append(("store", store_words(plan)))
    work = f"at work about {rest}{' (the decoder)' if run.encoders else ''}"
    rows.append(("memory", f"{bytes_words(need.total)} on rank {rank}: state {state}, {work}"))
    return Table("", ("", ""), tuple(rows))


def _ranks(grid: Grid) -> str:
    count = len(grid.ranks)
    return f"{count:,} rank{'s' * (count > 1)}, {axes_words(grid)}" if count > 1 else "one rank"


def _axis_rows(grid: Grid) -> Iterator[Row]:
    for axis, size in (pair for pair in grid.axes if pair[1] > 1):
        count = len(grid.ranks) // size
        first = [ranks for ranks, _ in zip(_groups(grid, axis), range(_GROUPS), strict=False)]
        words = "  ".join(f"[{_few(ranks)}]" for ranks in first)
        yield axis, str(size), f"{count:,}", words + ("  ..." if count > _GROUPS else "")


def _groups(grid: Grid, axis: str) -> Iterator[tuple[int, ...]]:
    """Groups along one axis, by their first rank's place, made as they are asked for."""
    return (grid.group(rank, axis) for rank in grid.ranks if grid.coordinates(rank)[axis] == 0)


def _few(ranks: Sequence[int], most: int = 4) -> str:
    shown = (
        list(map(str, ranks)) if len(ranks) <= most else [*map(str, ranks[: most - 1]), "...", str(ranks[-1])]
    )
    return " ".join(shown)


def picture(grid: Grid) -> Table:
    """Ranks by outer axes (down) and inner axes (across); of many, the first ones and the last."""
    outer = [(axis, size) for axis, size in grid.axes if axis not in _INNER]
    inner = [(axis, size) for axis, size in grid.axes if axis in _INNER]
    across, down = grid.size(*(a for a, _ in inner)), grid.size(*(a for a, _ in outer))
    columns, lines = _ends(across, _COLUMNS), _ends(down, _ROWS)
    head = ("", *("..." if c is None else _place(inner, c) for c in columns))
    rows = [
        (
            "..." if line is None else _place(outer, line),
            *(
                "..." if None in (line, c) else str(grid.ranks[(line or 0) * across + (c or 0)])
                for c in columns
            ),
        )
        for line in lines
    ]
    return Table(f"  {_formula(grid)}" if len(grid.ranks) > 1 else "", head, tuple(rows), picture=True)


def _ends(count: int, most: int) -> list[int | None]:
    """All of ``count`` numbers, or the first ones, None for a gap, and the last."""
    return [*range(count)] if count <= most else [*range(most - 2), None, count - 1]


def _place(axes: Sequence[tuple[str, int]], index: int) -> str:
    words: list[str] = []
    for axis, size in reversed(axes):
        index, at = divmod(index, size)
        words += [f"{axis} {at}"] if size > 1 else []
    return " ".join(reversed(words))


def _formula(grid: Grid) -> str:
    """``rank = 8 x dp + tp``: how the picture goes on."""
    terms, stride = list[str](), 1
    for axis, size in reversed(grid.axes):
        if size > 1:
            terms.append(f"{stride} x {axis}" if stride > 1 else axis)
        stride *= size
    first = grid.ranks[0]
    straight = list(grid.ranks) == list(range(first, first + len(grid.ranks)))
    terms += [str(first)] if first and straight else []
    return f"{'rank' if straight else 'place in the list of ranks'} = {' + '.join(reversed(terms))}"


def _unit_rows(plan: Plan, unit: Unit) -> Iterator[Row]:
    positions = plan.positions(unit.names[0])
    plan = plan.at(positions[0])
    rank = plan.dense.firsts[positions[0]]
    several = f" x {len(unit.names)}" if len(unit.names) > 1 else ""
    for i, spec in enumerate(unit.specs):
        here, layout = plan.shape(spec, rank), plan.of(spec)
        copies = sorted({len(layout.holders(positions, piece.holders)) for piece in plan.held(spec, rank)})
        folded = layout is plan.experts
        cut = _folded_words(plan, spec) if folded else _cut_words(plan.dense.plane, spec, here)
        label = unit.kind + several if i == 0 else ""
        yield label, spec.name, _shape(spec.shape), cut, _shape(here), ", ".join(f"{n:,}" for n in copies)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape)


def _cut_words(plane: Plane, spec: ParamSpec, here: tuple[int, ...]) -> str:
    """``heads/tp + groups/tp (shared by 2), embed/tp_embed``."""
    embed_cut = any(
        dim[0].axis == "embed" and local < sum(part.size for part in dim)
        for dim, local in zip(spec.dims, here, strict=True)
    )
    names = [axis for axis in ("tp", "tp_embed") if getattr(plane, axis) > 1]
    parts = plane.tp if embed_cut else plane.size
    over = "tp" if embed_cut or len(names) < 2 else f"({' x '.join(names)})"
    over = over if embed_cut or len(names) != 1 else names[0]
    return ", ".join(
        _dim_words(dim, plane, (over, parts), local < sum(part.size for part in dim))
        for dim, local in zip(spec.dims, here, strict=True)
    )


def _dim_words(dim: Dim, plane: Plane, over: tuple[str, int], cut: bool) -> str:
    words: dict[str, None] = {}
    axes, parts = over
    for part in dim:
        if part.axis == "embed":
            words["embed/tp_embed" if cut else "embed"] = None
        elif part.axis not in plane.shard or parts == 1:
            words[part.axis] = None
        else:
            shared = part.axis in SHARED and parts > part.count
            note = f" (shared by {parts // part.count})" if shared else ""
            words[f"{part.axis}/{axes}{note}" if part.count > 1 else part.axis] = None
    return " + ".join(words)


def _folded_words(plan: Plan, spec: ParamSpec) -> str:
    cuts = {"experts": "ep", "expert_mlp": "etp"}
    names = (part.axis for dim in spec.dims for part in dim)
    return ", ".join(
        f"{name}/{cuts[name]}" if plan.experts.grid.size(cuts.get(name, "")) > 1 else name for name in names
    )


def memory_table(rank: int, need: Memory, world: int, activations: str = "estimate") -> Table:
    """Bytes of the rank that needs most; ``activations``: what is said of these."""
    rows = [
        ("weights", need.weights),
        ("gradients", need.gradients),
        ("master weights", need.master),
        ("moments", need.moments),
        ("units at work", need.gathered),
        (f"activations ({activations})", need.activations),
        ("together", need.total),
    ]
    title = "memory" if world == 1 else f"memory of rank {rank}, which needs most"
    return Table(title, ("", ""), tuple((name, bytes_words(count)) for name, count in rows if count))
