"""Every problem of a plan, in the words that users read; and plans that fit."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from weft.config.load import from_dict
from weft.plan.check import check, check_run, executable
from weft.plan.grid import Grid
from weft.plan.layout import plan_of
from weft.plan.units import same_stages
from weft.recipes.registry import RECIPES
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import PlanConfig

MODEL = HybridConfig(
    pattern="ME*-/*E",
    vocab_size=61,
    hidden_size=48,
    num_attention_heads=12,
    num_key_value_heads=2,
    mamba_num_heads=12,
    n_groups=2,
    intermediate_size=48,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=24,
)


def said(world: int, model: HybridConfig = MODEL, batch: int = 0, **decoder: Any) -> list[str]:
    experts = decoder.pop("experts", {})
    plan = from_dict(PlanConfig, {"decoder": decoder, "experts": experts})
    return [str(problem) for problem in check(model, plan, world, batch)]


@pytest.mark.parametrize(
    ("world", "decoder", "message"),
    [
        (4, {"ranks": "0-7"}, "plan.decoder.ranks: '0-7' names rank 7, but there are 4 ranks (0 to 3)"),
        (
            4,
            {"tp": 3},
            "plan.decoder.tp: tp 3 does not divide the 4 ranks; choose sizes whose product divides 4",
        ),
        (6, {"tp": 2, "tp_embed": 2}, "tp 2 x tp_embed 2 = 4 does not divide the 6 ranks"),
        (
            8,
            {"dp": 2, "tp": 2},
            "plan.decoder.dp: 2 x (tp 2) is 4, but there are 8 ranks; set dp to 4, or to 0",
        ),
        (8, {"dp": 3}, "plan.decoder.dp: dp is 3, but there are 8 ranks; set dp to 8"),
        (
            8,
            {"store": {"shards": 3}},
            "plan.decoder.store.shards: 3 does not divide dp = 8; it can be 1, 2, 4, 8",
        ),
        (
            2,
            {"shard": {"heads": "dp"}},
            "plan.decoder.shard.heads: 'dp' cannot cut a dimension; use tp or none",
        ),
        (
            2,
            {"shard": {"head": "tp"}},
            "plan.decoder.shard.head: 'head' is not a dimension that a table cuts; tp can",
        ),
        (2, {"shard": {"embed": "tp"}}, "tp_embed cuts embed"),
        (
            2,
            {"tp": 2, "shard": {"groups": "none"}},
            "plan.decoder.shard.groups: none, but 2 ranks share each layer",
        ),
        (
            8,
            {"tp": 8},
            "plan.decoder.tp: 8 ranks do not divide heads = 12 (model.num_attention_heads); "
            "tp can be 1, 2, 3, 4, 6 or 12",
        ),
        (5, {"tp_embed": 5}, "plan.decoder.tp_embed: 5 ranks do not divide embed = 48 (model.hidden_size)"),
        (
            3,
            {"tp": 3},
            "3 ranks neither divide nor are a multiple of kv_heads = 2 (model.num_key_value_heads)",
        ),
        (3, {"tp": 3}, "3 ranks neither divide nor are a multiple of groups = 2 (model.n_groups)"),
        (9, {"tp": 9}, "9 ranks do not divide mlp = 24 (model.moe_shared_expert_intermediate_size)"),
        (
            10,
            {"tp": 5, "tp_embed": 2},
            "10 ranks do not divide heads = 12 (model.mamba_num_heads); tp x tp_embed can",
        ),
        (8, {"pp": 8}, "plan.decoder.pp: 8 stages, but model.pattern has 4 layers; set 4 or less"),
        (
            4,
            {"experts": {"ep": 3}},
            "plan.experts.ep: ep 3 x etp 1 = 3 does not divide the 4 ranks of a stage",
        ),
        (
            3,
            {"experts": {"ep": 3}},
            "plan.experts.ep: 3 ranks do not divide 8 (model.n_routed_experts); ep can be 1, 2",
        ),
        (
            5,
            {"experts": {"etp": 5}},
            "plan.experts.etp: 5 ranks do not divide 12 (model.moe_intermediate_size)",
        ),
        (
            10,
            {"cp": 5, "attend": "all_to_all"},
            "plan.decoder.attend: all_to_all gives each of 5 cp ranks as many heads, but there are 12",
        ),
        (
            8,
            {"cp": 4, "tp": 2, "scan": "all_to_all"},
            "plan.decoder.scan: all_to_all gives each of 4 cp ranks as many heads, but there are 6",
        ),
        (
            4,
            {"experts": {"ep": 4, "transport": "per_node"}},
            "plan.experts.transport: per_node needs ep x etp = 4 ranks on several whole nodes of 8",
        ),
    ],
)
def test_problems(world: int, decoder: dict[str, Any], message: str) -> None:
    found = said(world, **decoder)
    assert any(message in line for line in found), found


def test_all_problems_come_at_once() -> None:
    found = said(16, batch=1, tp=8, experts={"ep": 16})
    assert len(found) == 4
    assert {line.partition(":")[0] for line in found} == {
        "plan.decoder.tp",
        "plan.decoder.dp",
        "plan.experts.ep",
    }


def test_the_batch_is_shared_unequally_but_not_by_more_readers_than_samples() -> None:
    assert said(4, batch=5) == []
    assert said(4, batch=3) == [
        "plan.decoder.dp: 4 readers share train.global_batch_size = 3 sequences; "
        "set dp to 3 or less (more tp, fewer ranks), or raise that"
    ]


@pytest.mark.parametrize(("tp", "tp_embed"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (6, 2)])
def test_heads_and_groups_that_are_shared_or_cut(tp: int, tp_embed: int) -> None:
    assert said(2 * tp * tp_embed, tp=tp, tp_embed=tp_embed) == []


def test_rows_of_a_plane_must_not_cut_through_shared_heads() -> None:
    model = replace(MODEL, num_key_value_heads=3, n_groups=3, num_attention_heads=12)
    found = said(6, model=model, tp=3, tp_embed=2)
    assert all("tp_embed = 2 cuts through" in line for line in found)


def test_models_without_experts_have_no_grid_for_them() -> None:
    found = said(2, model=replace(MODEL, pattern="M*-"), experts={"ep": 2})
    assert found == ["plan.experts.ep: 2, but model.pattern 'M*-' has no E layer; set 1"]


@dataclass(frozen=True, kw_only=True)
class OddNorm(HybridConfig):
    @property
    def _mamba(self) -> dict[str, Any]:
        return {**super()._mamba, "norm_group": 5 * self.mamba_head_dim}


def test_a_norm_of_whole_groups_or_whole_ranks() -> None:
    odd = OddNorm(**{name: getattr(MODEL, name) for name in HybridConfig.__dataclass_fields__})
    found = said(2, model=odd, tp=2)
    message = "2 ranks hold 384 channels each of a norm in groups of 320 (Mamba); one must divide the other"
    assert found == [f"plan.decoder.tp: {message}: choose another tp"]


def test_nested_grids_have_the_same_stages() -> None:
    outer = Grid(range(8), (("pp", 2), ("dp", 4)))
    assert same_stages(outer, Grid((0, 2, 1, 3, 4, 5, 6, 7), (("pp", 2), ("edp", 1), ("ep", 4))))
    assert not same_stages(outer, Grid(range(8), (("pp", 1), ("edp", 8))))
    assert not same_stages(outer, Grid((0, 1, 2, 4, 3, 5, 6, 7), (("pp", 2), ("edp", 4))))


def test_samples_shorter_than_the_ranks_that_share_them() -> None:
    run = stdlib_lm()
    short = replace(
        run, data=replace(run.data, seq_length=2), plan=from_dict(PlanConfig, {"decoder": {"tp": 4}})
    )
    assert "4 ranks share the tokens of a sample of data.seq_length = 2" in str(check_run(short, 4)[0])


def test_ranks_without_work() -> None:
    run = replace(stdlib_lm(), plan=from_dict(PlanConfig, {"decoder": {"ranks": "0-1"}}))
    (problem,) = check_run(run, 4)
    assert problem.path == "plan.decoder.ranks"
    assert "rank 2 has nothing to do; start 2 ranks" in problem.message


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_one_process_and_can_run(name: str) -> None:
    run = RECIPES[name]()
    assert check_run(run, 1) == []
    assert executable(plan_of(run.plan, 1)) == []


@pytest.mark.parametrize(
    ("plan", "path"),
    [
        ({"decoder": {"tp": 2, "shard": {"vocab": "none"}}}, "plan.decoder.shard.vocab"),
    ],
)
def test_what_is_planned_but_not_run(plan: dict[str, Any], path: str) -> None:
    config = from_dict(PlanConfig, plan)
    assert check(MODEL, config, 4) == []
    assert [problem.path for problem in executable(plan_of(config, 4))] == [path]
