"""Whether a plan fits a model and a number of ranks: every problem at once, with both numbers and the fix."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from weft.config.base import Config
from weft.config.errors import ConfigError, Problem
from weft.plan.context import attend_refusal, scan_refusal
from weft.plan.grid import divisors
from weft.plan.layout import Plan, of_experts, plan_of
from weft.plan.plans import Plans, plans_of_run
from weft.plan.shard import SHARED, Plane, held, localize
from weft.plan.step import step_of
from weft.plan.units import same_stages, units
from weft.spec.hybrid import HybridConfig
from weft.spec.layers import AttentionConfig, MambaConfig, MixerConfig, NormConfig
from weft.spec.layout import PlanConfig
from weft.spec.param import Part
from weft.spec.run import RunConfig

# What a user sets for each count that a layout cuts: (layer, field) or the axis alone.
_FIELDS = {
    ("Attention", "heads"): "num_attention_heads",
    ("Attention", "kv_heads"): "num_key_value_heads",
    ("Mamba", "heads"): "mamba_num_heads",
    ("Mamba", "groups"): "n_groups",
    ("MLP", "mlp"): "intermediate_size",
    ("MoE", "mlp"): "moe_shared_expert_intermediate_size",
}
_WHOLE = {"heads", "kv_heads", "groups"}  # dimensions that must be cut where ranks share a layer


@dataclass(frozen=True)
class _Count:
    """Items that a layout cuts, and the setting that counts them."""

    axis: str
    count: int
    setting: str

    def cut_by(self, plane: Plane) -> bool:
        """Whether the plane can cut them."""
        try:
            plane.items(Part(self.axis, self.count), 0)
        except ValueError:
            return False
        return True


def check_run(run: RunConfig, world: int) -> list[Problem]:
    """Problems of a run's plan on ``world`` ranks; paths start with ``plan``."""
    found = check(run.model, run.plan, world, batch=run.train.global_batch_size)
    try:
        plans = plans_of_run(run, world)
    except ConfigError as error:
        return list(dict.fromkeys([*found, *error.problems]))
    found += [problem for name in run.encoders for problem in _encoder(run, plans, name)]
    found += idle(plans)
    return found or [*_tokens(run, plans.decoder), *_schedule(run, plans)]


def idle(plans: Plans) -> list[Problem]:
    """Ranks that no module has."""
    ranks = [rank for rank in range(plans.world) if not plans.of_rank(rank)]
    fix = f"start {plans.world - len(ranks)} ranks, or name these too"
    return [Problem("plan.decoder.ranks", f"rank {rank} has nothing to do; {fix}") for rank in ranks[:1]]


def _encoder(run: RunConfig, plans: Plans, name: str) -> Iterator[Problem]:
    """What an encoder's layers do not allow."""
    config, plan = run.encoders[name], plans.all[name]
    layout, path = plan.dense, f"plan.{name}"
    causes: dict[str, None] = {}
    for spec in config.params():
        try:
            held(spec, layout.plane, 0)
        except ValueError as error:
            causes.setdefault(str(error))
    yield from (Problem(f"{path}.tp", cause) for cause in causes)
    for axis in ("tp", "cp"):
        if config.together and layout.grid.size(axis) > 1:
            message = f"{layout.grid.size(axis)}, but rows of a video are dropped by looking at all of them"
            yield Problem(f"{path}.{axis}", f"{message} (encoders.{name}.pruning); set 1, or pruning to 0")


def check(model: HybridConfig, config: PlanConfig, world: int, batch: int = 0) -> list[Problem]:
    """Problems of a plan for ``model`` on ``world`` ranks, all at once; paths start with ``plan``.

    Args:
        model: the hybrid decoder.
        config: the plan.
        world: ranks of the run.
        batch: sequences per optimizer step; 0 is not known.
    """
    try:
        plan = plan_of(config, world, model)
    except ConfigError as error:
        return list(error.problems)
    found = [
        problem.under("decoder") for each in plan.of_stages or (plan,) for problem in _layout(model, each)
    ]
    found += [problem.under("decoder") for problem in (*_grid(model, plan, batch), *_tables(plan))]
    found += [problem.under("experts") for problem in _experts(model, plan)]
    return [problem.under("plan") for problem in dict.fromkeys(found)]


def _layout(model: HybridConfig, plan: Plan) -> list[Problem]:
    """Problems of the layout of one pipeline rank."""
    plane = plan.dense.plane
    found = [*_maps(plan), *_counts(model, plane)]
    return found or [*_norms(model, plane), *_overlaps(model, plane), *_sharing(model, plan)]


def _tables(plan: Plan) -> Iterator[Problem]:
    """A token table on two pipeline ranks lies alike on both."""
    planes = [plan.at(position).dense.plane for position in plan.positions("embed")]
    if len(set(planes)) > 1:
        first, last = (plane.tp for plane in planes)
        message = (
            f"the first pipeline rank has tp {first} and the last one {last}, but both hold the token table"
        )
        yield Problem("tp_of_stages", f"{message} (a tied head or MTP reads it); give both the same tp")


def _schedule(run: RunConfig, plans: Plans) -> Iterator[Problem]:
    """What the lists of actions cannot do, proved before launch."""
    config, count = run.plan.schedule, plans.decoder.microbatches(run.train)
    path = f"plan.schedule.{'file' if config.kind == 'file' else 'kind'}"
    try:
        schedule, proof = step_of(plans, run.modules, config, count)
    except ValueError as error:
        bound = "encoder_groups_in_flight" if "in_flight" in str(error) else "resident"
        yield Problem(f"plan.schedule.{bound}" if getattr(config, bound) else path, str(error))
        return
    if schedule.microbatches != count:
        message = f"the lists of {config.file} are for {schedule.microbatches} microbatches"
        made = f"train.global_batch_size = {run.train.global_batch_size} makes {count}"
        yield Problem(path, f"{message}, but {made}; change train.micro_batch_size or the lists")
    elif proof.faults:
        yield Problem(path, proof.text)


def executable(plan: Plan) -> list[Problem]:
    """What this version plans, shows and costs but does not run yet; paths start with ``plan``."""
    found: list[Problem] = []
    if plan.dense.plane.size > 1 and "vocab" not in plan.dense.plane.shard:
        message = "a vocabulary that every rank of a plane holds can be planned, but not run by this version"
        found.append(Problem("plan.decoder.shard.vocab", f"{message}; remove it"))
    return found


def _maps(plan: Plan) -> Iterator[Problem]:
    plane = plan.dense.plane
    for name in sorted(_WHOLE - plane.shard) if plane.size > 1 else ():
        message = f"none, but {plane.size} ranks share each layer ({_product(plane)}); remove it"
        yield Problem(f"shard.{name}", f"{message}: only mlp and vocab may stay whole")


def _product(plane: Plane) -> str:
    if plane.tp_embed == 1 or plane.tp == 1:
        return f"tp = {plane.tp}" if plane.tp_embed == 1 else f"tp_embed = {plane.tp_embed}"
    return f"tp {plane.tp} x tp_embed {plane.tp_embed} = {plane.size}"


def _counts(model: HybridConfig, plane: Plane) -> Iterator[Problem]:
    """Counts that the ranks of a plane neither divide nor, where allowed, share."""
    for count in dict.fromkeys(_cut(model)):
        if count.cut_by(plane):
            continue
        embed = count.axis == "embed"
        ranks = plane.tp_embed if embed else plane.size
        whole = sorted({*divisors(count.count), *_multiples(count, 4 * ranks)})
        fitting = [n for n in whole if count.cut_by(Plane(1, n, plane.shard) if embed else Plane(n))]
        name = "tp_embed" if embed or plane.tp == 1 else "tp" if plane.tp_embed == 1 else "tp x tp_embed"
        verb = "neither divide nor are a multiple of" if count.axis in SHARED else "do not divide"
        message = f"{ranks} ranks {verb} {count.axis} = {count.count} (model.{count.setting})"
        path = "tp_embed" if embed or plane.tp == 1 else "tp"
        yield Problem(path, f"{message}; {name} can be {_listed(fitting)}")


def _multiples(count: _Count, most: int) -> Iterable[int]:
    return range(count.count, most, count.count) if count.axis in SHARED else ()


def _listed(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers]
    if len(shown) > 12:
        shown = [*shown[:10], "...", shown[-1]]
        return ", ".join(shown)
    return " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _cut(model: HybridConfig) -> Iterator[_Count]:
    """Every count of the model that a plane cuts, by the fields that declare a dimension."""
    yield _Count("embed", model.hidden_size, "hidden_size")
    yield _Count("vocab", model.vocab_size, "vocab_size")
    for mixer in _mixers(model):
        kind = type(mixer).__name__.removesuffix("Config")
        for axis, value in _declared(mixer):
            if axis != "embed":
                yield _Count(axis, value, _FIELDS.get((kind, axis), f"{kind}.{axis}"))


def _declared(config: Config) -> Iterator[tuple[str, int]]:
    for f in fields(config):
        value: Any = getattr(config, f.name)
        if isinstance(value, Config):
            yield from _declared(value)
        elif f.metadata.get("dim") and value:
            yield f.metadata["dim"], value


def _mixers(model: HybridConfig) -> list[MixerConfig]:
    return [unit.block.mixer for unit in units(model) if unit.block]


def _norms(model: HybridConfig, plane: Plane) -> Iterator[Problem]:
    """Groups of a norm over inner channels: whole groups on each rank, or whole ranks in each group."""
    for mixer in _mixers(model):
        norm = getattr(mixer, "norm", None)
        if not isinstance(norm, NormConfig) or plane.kind(norm.dims) != "inner":
            continue
        width = sum(len(plane.items(part, 0)) * part.width for part in norm.dims)
        if width % norm.group and norm.group % width:
            kind = type(mixer).__name__.removesuffix("Config")
            message = f"{plane.size} ranks hold {width} channels each of a norm in groups of {norm.group}"
            yield Problem(
                "tp", f"{message} ({kind}); one must divide the other: choose another {_axes(plane)}"
            )


def _axes(plane: Plane) -> str:
    return "tp" if plane.tp_embed == 1 else "tp or tp_embed"


def _overlaps(model: HybridConfig, plane: Plane) -> Iterator[Problem]:
    """What only the boxes themselves show: rows of a plane that would hold parts of shared heads."""
    causes: dict[str, None] = {}
    for unit in units(model):
        for spec in unit.specs:
            try:
                held(spec, plane, 0)
            except ValueError as error:
                causes.setdefault(str(error))
    yield from (Problem("tp_embed", cause) for cause in causes)


def _grid(model: HybridConfig, plan: Plan, batch: int) -> Iterator[Problem]:
    grid = plan.dense.grid
    if 0 < batch < grid.size("dp"):
        fix = f"set dp to {batch} or less (more tp, fewer ranks), or raise that"
        message = f"{grid.size('dp')} readers share train.global_batch_size = {batch} sequences; {fix}"
        yield Problem("dp", message)
    if not same_stages(grid, plan.experts.grid):
        yield Problem(
            "pp", "the decoder's stages and the experts' have different ranks; give both the same pp"
        )


def _sharing(model: HybridConfig, plan: Plan) -> Iterator[Problem]:
    """Forms of attention and scans that the heads of a rank do not allow."""
    plane, cp = plan.dense.plane, plan.dense.grid.size("cp")
    for mixer in dict.fromkeys(_mixers(model)):
        own = localize(mixer, plane, 0)
        match own:
            case AttentionConfig():
                reason = attend_refusal(plan.dense.attend, own.heads, own.kv_heads, cp)
            case MambaConfig():
                reason = scan_refusal(plan.dense.scan, own.heads, own.groups, cp)
            case _:
                continue
        name, _, message = reason.partition(": ")
        if reason:
            yield Problem(name, message)


def _experts(model: HybridConfig, plan: Plan) -> Iterator[Problem]:
    mixtures = any(of_experts(spec) for unit in units(model) for spec in unit.specs)
    limits = (("ep", "n_routed_experts"), ("etp", "moe_intermediate_size"))
    for axis, setting in limits:
        parts, count = plan.experts.grid.size(axis), int(getattr(model, setting))
        if parts > 1 and not mixtures:
            yield Problem(axis, f"{parts}, but model.pattern {model.pattern!r} has no E layer; set 1")
        elif count % parts:
            message = f"{parts} ranks do not divide {count} (model.{setting})"
            yield Problem(axis, f"{message}; {axis} can be {_listed(divisors(count))}")
    ranks, node = plan.experts.places, plan.experts.node
    if plan.experts.transport == "per_node" and (
        ranks <= node or ranks % node or node % plan.experts.grid.size("etp")
    ):
        message = f"per_node needs ep x etp = {ranks} ranks on several whole nodes of {node}"
        yield Problem("transport", f"{message} (plan.experts.node); choose per_rank, or set node")


def _tokens(run: RunConfig, plan: Plan) -> Iterator[Problem]:
    plane, cp = plan.dense.plane, plan.dense.grid.size("cp")
    if run.data.seq_length < plane.size * cp:
        message = (
            f"{plane.size * cp} ranks share the tokens of a sample of data.seq_length = {run.data.seq_length}"
        )
        yield Problem("plan.decoder.tp", f"{message}, so some have none; use fewer or raise that")
