"""From one plan to another: what changes, and bytes received, against sets of elements."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.tiny import CONFIG
from weft.config.load import from_dict
from weft.plan.diff import diff, flat_boxes, moved
from weft.plan.layout import Plan, of_experts, plan_of
from weft.plan.units import units
from weft.spec.count import state_of
from weft.spec.layout import PlanConfig

MODEL = replace(CONFIG, mamba_num_heads=8, num_attention_heads=8, moe_shared_expert_intermediate_size=24)


def plan(world: int, experts: dict[str, Any] | None = None, **decoder: Any) -> Plan:
    return plan_of(from_dict(PlanConfig, {"decoder": decoder, "experts": experts or {}}), world, MODEL)


def elements(laid: Plan, rank: int, precision: str) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Numbers of the elements of each parameter that rest at a rank: weights, optimizer state."""
    weights: dict[str, set[int]] = {}
    state: dict[str, set[int]] = {}
    if rank not in laid.dense.grid:
        return weights, state
    stage = laid.position(rank)
    for unit in units(MODEL):
        for name in (n for n in unit.names if stage in laid.positions(n)):
            buffers: dict[object, list[tuple[str, int]]] = {}
            for spec in unit.specs:
                numbers = np.arange(spec.numel).reshape(spec.shape)
                local = np.full(laid.shape(spec, rank), -1)
                for held in laid.held(spec, rank):
                    outer = numbers[tuple(map(slice, held.box.start, held.box.stop))]
                    local[tuple(map(slice, held.local.start, held.local.stop))] = outer
                key = state_of(spec, precision), spec.decay, of_experts(spec), laid.rests(spec, rank)
                buffers.setdefault(key, []).extend((f"{name}.{spec.name}", int(n)) for n in local.flatten())
            for (_, _, _, (cuts, index)), members in buffers.items():
                mine = np.array_split(np.arange(len(members)), cuts)[index]
                cut = [members[i] for i in mine]
                for place, chosen in (
                    (state, cut),
                    (weights, cut if laid.dense.store.level == 3 else members),
                ):
                    for parameter, number in chosen:
                        place.setdefault(parameter, set()).add(number)
    return weights, state


PLANS = [
    plan(4),
    plan(4, tp=2, store={"level": 1}),
    plan(8, tp=4, store={"level": 3}),
    plan(8, tp=2, tp_embed=2, store={"level": 3, "shards": 1}),
    plan(4, tp=2, tp_embed=2, store={"level": 2}),
    plan(8, pp=2, tp=2, experts={"ep": 2, "etp": 2}, store={"level": 3}),
    plan(6, ranks="2-5", tp=2, shard={"mlp": "none"}),
    plan(1),
]


@pytest.mark.parametrize(("before", "after"), [*pairwise(PLANS), *pairwise(reversed(PLANS))])
def test_bytes_equal_sets_of_elements(before: Plan, after: Plan) -> None:
    specs = {spec.name: state_of(spec, "bf16") for spec in MODEL.params()}
    each: dict[int, int] = {}
    for rank in after.dense.grid.ranks:
        old, new = elements(before, rank, "bf16"), elements(after, rank, "bf16")
        each[rank] = 0
        for kind, (there, wanted) in enumerate(zip(old, new, strict=True)):
            for name, numbers in wanted.items():
                size = specs[name].weight if kind == 0 else specs[name].master + specs[name].moments
                each[rank] += size * len(numbers - there.get(name, set()))
    found = moved(MODEL, "bf16", before, after)
    assert found.total == sum(each.values())
    assert found.largest == max(each.values()) == each[found.rank]


def test_no_change_moves_nothing() -> None:
    for laid in PLANS[2:6:3]:
        assert diff(laid, laid) == []
        assert moved(MODEL, "fp32", laid, laid).total == 0


def test_changes_are_named_as_settings() -> None:
    after = plan(8, tp=2, ranks="0-3", shard={"mlp": "none"}, store={"level": 3, "over": ["dp", "cp"]})
    assert diff(plan(4, tp=4), after) == [
        ("ranks", "4", "8"),
        ("decoder.dp", "1", "2"),
        ("decoder.tp", "4", "2"),
        ("decoder.shard.mlp", "tp", "none"),
        ("decoder.store.level", "0", "3"),
        ("decoder.store.over", "('dp',)", "('dp', 'cp')"),
    ]


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2)])
def test_runs_of_a_flat_tensor_are_boxes(shape: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            boxes = flat_boxes(shape, start, stop)
            found = [n for box in boxes for n in numbers[box.within(type(box).whole(shape))].flatten()]
            assert found == list(range(start, stop))
            assert len(boxes) <= 2 * len(shape) - 1
