"""What ranks exchange inside the layers of a plan, in each form that is possible, and which one is taken."""

from collections.abc import Iterator, Mapping

from weft.plan.context import AttendShape, Choice, ScanShape, choose_attend, choose_scan
from weft.plan.dispatch import TRANSPORTS, Dispatch, Link, Transport, choose, traffic
from weft.plan.layout import Experts, Plan
from weft.plan.shard import localize
from weft.plan.units import units
from weft.spec.layers import AttentionConfig, MambaConfig, MoEConfig
from weft.spec.precision import ITEMSIZE, PRECISIONS
from weft.spec.run import RunConfig

Exchange = tuple[str, str, str, Mapping[str, Link], Mapping[str, str]]
"""Layers, setting, form, mean bytes that a rank receives in a layer in each form, reasons against others.

Nodes are told apart for experts only (``experts.node``).
"""


def exchanges(run: RunConfig, plan: Plan) -> Iterator[Exchange]:
    """Exchanges of one microbatch of whole samples, forward and backward, hidden states and all else.

    Attention and scans where ranks share tokens; experts where ranks share them, under balanced routing.
    """
    policy, shared = PRECISIONS[run.train.precision], plan.dense.grid.size("cp")
    item = ITEMSIZE[policy.params]
    samples = min(run.train.micro_batch_size, -(-run.train.global_batch_size // plan.dense.readers))
    lengths = (run.data.seq_length,) * samples
    counts = plan.dense.tokens(sum(lengths))
    for unit in units(run.model):
        if unit.block is None:
            continue
        name = unit.kind + (f" x {len(unit.names)}" if len(unit.names) > 1 else "")
        mixer = localize(unit.block.mixer, plan.dense.plane, 0)
        match mixer:
            case AttentionConfig() if shared > 1:
                heads = mixer.heads, mixer.kv_heads, mixer.head_dim
                found = choose_attend(AttendShape(lengths, counts, *heads, item))
                yield _shared(name, "decoder.attend", plan.dense.attend, found, shared)
            case MambaConfig() if shared > 1:
                sizes = mixer.heads, mixer.head_dim, mixer.groups, mixer.state, mixer.conv
                shape = ScanShape(lengths, counts, *sizes, item, ITEMSIZE[policy.master])
                yield _shared(name, "decoder.scan", plan.dense.scan, choose_scan(shape), shared)
            case MoEConfig() if plan.experts.places > 1 and isinstance(whole := unit.block.mixer, MoEConfig):
                own = len(plan.dense.plane.rows(counts[0], 0))
                yield _experts(name, whole, plan, own, item)
            case _:
                pass


def _shared(name: str, setting: str, form: str, found: Choice, ranks: int) -> Exchange:
    each = {other: Link(total / ranks, 0) for other, total in found.bytes.items()}
    return name, setting, found.form if form == "auto" else form, each, found.refused


def _experts(name: str, mixer: MoEConfig, plan: Plan, tokens: int, item: int) -> Exchange:
    shape = dispatch_of(mixer, plan.experts, tokens, item)
    each = {other: traffic(other, shape).step for other in TRANSPORTS}
    return name, "experts.transport", transport_of(mixer, plan.experts, item), each, {}


def dispatch_of(mixer: MoEConfig, experts: Experts, tokens: int, item: int) -> Dispatch:
    """The dispatch of a mixture (as a whole) with so many tokens on each rank, ``item`` bytes a number."""
    router = mixer.router
    grid = experts.grid.size("ep"), experts.grid.size("etp"), experts.node
    groups = router.expert_groups, router.top_groups
    return Dispatch(tokens, mixer.width, router.top_k, mixer.experts, *grid, item, *groups)


def transport_of(mixer: MoEConfig, experts: Experts, item: int) -> Transport:
    """How its tokens travel: as the plan says, or else with the fewest bytes.

    Experts that are padded take ``all_to_all``: only there are all shapes static.
    """
    if experts.transport != "auto":
        return experts.transport
    return "all_to_all" if mixer.router.pad_to_capacity else choose(dispatch_of(mixer, experts, 1, item))
