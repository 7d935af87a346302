"""Every way of resting gives the gradients, the norm and the steps of plain torch on one process."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.once import once
from tests.tiny import CONFIG, batch
from weft.build.model import assemble
from weft.models.hybrid import HybridLM
from weft.ops.segments import Segments
from weft.parallel.collectives import received
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.flat import boxes, spans
from weft.parallel.ledger import record
from weft.parallel.mesh import Mesh, mesh_of
from weft.parallel.store import Store
from weft.parallel.threads import run_threads
from weft.plan.box import Box, tiles
from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig
from weft.spec.param import ZEROS, ParamSpec, dim
from weft.spec.run import OptimizerConfig
from weft.train.optimizer import Optimizer

LR, DECAY = 0.01, 0.1
CPU = torch.device("cpu")
TINY = replace(CONFIG, pattern="M*/E")  # two MTP depths of one physical block


def layout(level: int, store: dict | None = None, **axes: int) -> PlanConfig:
    cut = StoreConfig(level=level, **(store or {}))
    return PlanConfig(decoder=LayoutConfig(store=cut, **axes))


def build(mesh: Mesh | None, precision: str = "fp64", **changes: object) -> HybridLM:
    """Values depend on names and global indices alone, whoever builds."""
    return assemble(replace(TINY, **changes), precision, CPU, 7, mesh)


def loss_of(model: HybridLM, seed: int) -> Tensor:
    made = batch((5 + seed % 4, 9), seed)
    arrays = (torch.from_numpy(a) for a in (made.tokens, made.future, made.mask))
    ctx = model.context(Segments(made.lengths))
    found = model.losses(*arrays, ctx, (0.02, 0.01, 0.01), chunk=8)
    extra = sum(((s.balance + s.z) * 0.1 for s in found.stats.values()), start=found.lm)
    return extra + sum(found.mtp)


@once(16)
def plain(micro: int, **changes: object) -> tuple[dict, list[float], dict]:
    """Gradients of the first of two steps, norms, and parameters after the last: torch and nothing else."""
    model = build(None, **changes)
    decay = {spec.name: spec.decay for spec in model.config.params()}
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decay[n] == on], "weight_decay": DECAY * on}
        for on in (False, True)
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    first: dict[str, Tensor] = {}
    norms = []
    for _ in range(2):
        adamw.zero_grad()
        for seed in range(micro):
            loss_of(model, seed).backward()
        norms.append(math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values())))
        first = first or {n: p.grad.clone() for n, p in named.items()}
        adamw.step()
    return first, norms, {n: p.detach() for n, p in named.items()}


def train(
    comm: Comm,
    plan: PlanConfig,
    micro: int,
    precision: str = "fp64",
    recompute: bool = False,
    **changes: object,
) -> tuple[Mesh, Store, dict, list, dict, HybridLM]:
    """The same with a store; each reader has its own of the ``micro`` microbatches of a step."""
    mesh = mesh_of(plan, comm)
    model = build(mesh, precision, **changes)
    model.set_recompute(recompute)
    store = Store(model, model.config.params(), precision, mesh)
    optimizer = Optimizer(store, OptimizerConfig(weight_decay=DECAY, beta1=0.9, beta2=0.95, eps=1e-8))
    first: dict[str, Tensor] = {}
    norms = []
    for _ in range(2):
        store.zero_grad()
        for seed in range(mesh.reader, micro, mesh.layout.readers):
            loss_of(model, seed).backward()
            store.end_pass()
            store.rest()
        store.reduce()
        norms.append(store.norm().item())
        if not first:
            first = {name: store.whole(name, lambda flat: flat.grad).clone() for name in store.names}
        optimizer.step(LR)
    params = {name: store.whole(name, lambda flat: flat.shard).clone() for name in store.names}
    with store.gathered():
        for name, value in params.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=0, atol=0)
    return mesh, store, first, norms, params, model


def assert_equal(found: tuple, micro: int, **changes: object) -> None:
    """fp64 to 1e-10 (docs/design.md, law 3)."""
    mesh, _, first, norms, params, model = found
    gradients, expected_norms, expected = plain(micro, **changes)
    assert norms == pytest.approx(expected_norms, abs=1e-10)
    specs = {spec.name: spec for spec in model.config.params() if not spec.buffer}
    assert specs.keys() == params.keys() == gradients.keys()
    for name, spec in specs.items():
        for held in mesh.held(spec):
            local, whole = (
                held.local.within(Box.whole(mesh.shape(spec))),
                held.box.within(Box.whole(spec.shape)),
            )
            for mine, theirs in ((first, gradients), (params, expected)):
                torch.testing.assert_close(
                    mine[name][local], theirs[name][whole], rtol=0, atol=1e-10, msg=name
                )


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "micro", "prefetch"), [(2, 4, 1), (3, 3, 0), (4, 4, 2)])
def test_data_parallel(level: int, ranks: int, micro: int, prefetch: int) -> None:
    """The token table, the head and the one physical MTP depth are each used twice or more."""
    plan = layout(level, {"prefetch": prefetch})
    for found in run_threads(ranks, lambda comm: train(comm, plan, micro)):
        assert_equal(found, micro)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_hybrid(level: int) -> None:
    """Two copies, each cut over two ranks."""
    plan = layout(level, {"shards": 2})
    for found in run_threads(4, lambda comm: train(comm, plan, 4)):
        assert {flat.comm.size for flat in found[1].flats} == {2, 4}  # the experts: all copies
        assert_equal(found, 4)


@pytest.mark.parametrize(
    ("level", "axis"), [(0, "tp"), (1, "tp"), (2, "tp"), (3, "tp"), (1, "tp_embed"), (3, "tp_embed")]
)
def test_shared_heads_and_groups(level: int, axis: str) -> None:
    """Two places share the only key/value head and the only group; the vocabulary, last, is cut unevenly."""
    plan, shared = layout(level, dp=2, **{axis: 2}), {"num_key_value_heads": 1, "n_groups": 1}
    shared |= {"pattern": "ME*", "mtp_num_depths": 0}
    for found in run_threads(4, lambda comm: train(comm, plan, 2, **shared)):
        assert_equal(found, 2, **shared)


@pytest.mark.parametrize("level", [2, 3])
def test_tied_head_and_recomputation(level: int) -> None:
    tied = {"tie_word_embeddings": True}
    for found in run_threads(2, lambda comm: train(comm, layout(level), 2, recompute=True, **tied)):
        assert_equal(found, 2, **tied)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_reduced_precision(level: int) -> None:
    """Gradients of bf16 are as far from those of fp64 as bf16 is, and add up in fp32."""
    for found in run_threads(2, lambda comm: train(comm, layout(level), 2, "bf16")):
        _, store, first, norms, _, _ = found
        assert {flat.grad.dtype for flat in store.flats} == {torch.float32}
        gradients, expected = plain(2)[:2]
        assert norms == pytest.approx(expected, rel=0.05)
        far = sum((first[n].double() - g).square().sum() for n, g in gradients.items())
        assert far.sqrt() < 0.05 * expected[0]


def test_level_of_one_rank_is_zero() -> None:
    mesh, store, *_ = found = train(SingleComm(), layout(3), 2)
    assert store.level == 0
    assert_equal(found, 2)
    for flat in store.flats:
        assert flat.master is flat.shard
        assert flat.master.data_ptr() == flat.sections[0].params[0].data_ptr()
    pieces = list(store.pieces(lambda flat: flat.master))
    assert all(piece.owned and piece.box == Box.whole(piece.shape) for piece in pieces)
    assert {piece.name for piece in pieces} == set(store.names)


def whole_units(model: HybridLM) -> set[str]:
    """Units whose parameters have memory."""
    units = model.units().items()
    return {name for name, unit in units if next(unit.parameters()).untyped_storage().nbytes()}


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_parameters_are_whole_only_while_they_are_used(prefetch: int) -> None:
    def work(comm: Comm) -> None:
        mesh = mesh_of(layout(3, {"prefetch": prefetch}), comm)
        model = build(mesh)
        store = Store(model, model.config.params(), "fp64", mesh)
        extra: list[int] = []  # units that are whole without being in use

        def look(unit: str) -> None:
            around = {name for name in model.units() if unit == name or unit.startswith(f"{name}.")}
            whole = whole_units(model)
            assert around <= whole
            extra.append(len(whole - around))

        def look_twice(unit: str, module: nn.Module, args: tuple, output: Tensor) -> None:
            look(unit)
            if output.requires_grad:
                output.register_hook(lambda grad: look(unit))

        for name, unit in model.units().items():
            if hasattr(unit, "mixer"):
                unit.norm.register_forward_hook(partial(look_twice, name))
        for microbatch in range(3):
            assert not whole_units(model)
            loss_of(model, 0).backward()
            store.end_pass()
            store.rest()
            assert max(extra) == (prefetch if microbatch else 0)
        with torch.no_grad():
            loss_of(model, 1)
        assert max(extra) == prefetch
        store.publish()
        assert not whole_units(model)

    run_threads(2, work)


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes(ranks: int) -> None:
    """To the byte: gradients travel once; parameters once, at level 3 once per use that needs them."""

    def moved(comm: Comm, level: int) -> list[int]:
        mesh = mesh_of(layout(level), comm)
        model = build(mesh, mtp_num_depths=0, pattern="ME*-")
        store = Store(model, model.config.params(), "fp64", mesh)
        loss_of(model, 0).backward()  # the first microbatch teaches the order
        store.end_pass()
        store.rest()
        store.reduce()
        with record(comm) as ledger:
            loss_of(model, 0).backward()
            store.end_pass()
            store.rest()
            store.reduce()
            store.publish()
        shard = sum(flat.grad.nbytes for flat in store.flats)
        sections = (section for flat in store.flats for section in flat.sections)
        tables = sum(s.width * 8 for s in sections if s.slots[0].spec.name in ("embed.weight", "head.weight"))
        operations = ("all_reduce", "reduce_scatter", "all_gather")
        runs = [run for flat in store.flats for run in flat.runs]
        alone = sum(received("all_reduce", ranks, 8 * (run.stop - run.start)) for run in runs)
        return [*map(ledger.bytes, operations), shard, tables, alone]

    for level in range(4):
        for summed, scattered, gathered, shard, tables, alone in run_threads(
            ranks, partial(moved, level=level)
        ):
            if level == 0:
                assert (summed, scattered, gathered) == (alone, 0, 0)
                assert alone == pytest.approx(2 * (ranks - 1) / ranks * shard, rel=0.01)  # but for padding
                continue
            others = ranks - 1
            again = others * (shard - tables) if level == 3 else 0  # tables form no gradient from themselves
            assert (summed, scattered, gathered) == (0, others * shard, others * shard + again)


@pytest.mark.parametrize(("axes", "store"), [({}, {}), ({}, {"shards": 2}), ({"tp": 2}, {})])
@pytest.mark.parametrize("level", [0, 1, 3])
def test_pieces_tile_every_parameter(axes: dict, store: dict, level: int) -> None:
    """Owned boxes of all ranks tile; what is written to the boxes of the shards is what layers read then."""
    whole = {name: p.detach() for name, p in build(None, num_key_value_heads=1).named_parameters()}

    def work(comm: Comm) -> list:
        mesh = mesh_of(layout(level, store, **axes), comm)
        model = build(mesh, num_key_value_heads=1)
        made = Store(model, model.config.params(), "fp64", mesh)
        found = [
            (piece.name, piece.shape, piece.box, piece.owned, piece.tensor.clone())
            for piece in made.pieces(lambda flat: flat.master)
        ]
        for piece in made.pieces(lambda flat: flat.shard):
            piece.tensor.add_(1)
        made.adopt()
        with made.gathered():
            for spec in (spec for spec in model.config.params() if not spec.buffer):
                local = model.get_parameter(spec.name).detach()
                for held in mesh.held(spec):
                    mine = local[held.local.within(Box.whole(tuple(local.shape)))]
                    assert torch.equal(mine, whole[spec.name][held.box.within(Box.whole(spec.shape))] + 1)
        return found

    found = [piece for pieces in run_threads(4, work) for piece in pieces]
    for name, shape, box, _, tensor in found:
        assert torch.equal(tensor, whole[name][box.within(Box.whole(shape))])
    for name, value in whole.items():
        assert tiles(tuple(value.shape), [box for n, _, box, owned, _ in found if n == name and owned])


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_ranges_are_boxes(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel()):
        for stop in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, stop))
            inside = [numbers[box.within(Box.whole(shape))].flatten() for box in found]
            assert torch.cat([*inside, numbers.new_zeros(0)]).tolist() == list(range(start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            for box in found:
                ranges = [number for first, last in spans(box, shape) for number in range(first, last)]
                assert ranges == numbers[box.within(Box.whole(shape))].flatten().tolist()


@pytest.mark.parametrize("box", [Box((0, 1), (3, 2)), Box((1, 0), (2, 4)), Box((1, 1), (0, 2))])
def test_boxes_are_ranges(box: Box) -> None:
    numbers = torch.arange(12).view(3, 4)
    ranges = [number for first, last in spans(box, (3, 4)) for number in range(first, last)]
    assert ranges == numbers[box.within(Box.whole((3, 4)))].flatten().tolist()


class Twice(nn.Module):
    """One layer used twice in a row, and a parameter that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.idle = nn.Linear(4, 4, dtype=torch.float64)
        for i, param in enumerate(self.parameters()):
            param.data = torch.linspace(-1, 1 + i, param.numel(), dtype=torch.float64).view(param.shape)

    def units(self) -> dict[str, nn.Module]:
        return {"layer": self.layer, "idle": self.idle}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)).square().sum()


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_unit_used_twice_in_a_row(level: int) -> None:
    def dims(name: str) -> ParamSpec:
        shape = (dim("a", 4), dim("b", 4)) if name.endswith("weight") else (dim("a", 4),)
        return ParamSpec(name, shape, ZEROS)

    def inputs(rank: int) -> Tensor:
        return torch.linspace(rank, 1, 8, dtype=torch.float64).view(2, 4).requires_grad_()

    def work(comm: Comm) -> dict[str, Tensor]:
        model, mesh = Twice(), mesh_of(layout(level), comm)
        store = Store(model, [dims(name) for name, _ in model.named_parameters()], "fp64", mesh)
        model(inputs(comm.rank)).backward()
        store.end_pass()
        store.rest()
        store.reduce()
        return {name: store.whole(name, lambda flat: flat.grad) for name in store.names}

    alone = Twice()
    (alone(inputs(0)) + alone(inputs(1))).backward()
    for found in run_threads(2, work):
        for name, param in alone.named_parameters():
            expected = torch.zeros_like(param) if param.grad is None else param.grad
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10)
