"""What a plan says that ranks exchange inside layers."""

from dataclasses import replace

import pytest

from tests.tiny import CONFIG
from weft.config.load import from_dict
from weft.plan.exchanges import exchanges
from weft.plan.layout import plan_of_run
from weft.plan.show import show
from weft.plan.table import as_text
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig


def run_of(model: dict[str, object] | None = None, **plan: object) -> RunConfig:
    config = replace(CONFIG, pattern="MM*E-", mtp_num_depths=0, **(model or {}))
    base = stdlib_lm()
    train = replace(base.train, micro_batch_size=1)  # of two samples each of two ranks would have one
    return replace(base, model=config, train=train, plan=from_dict(PlanConfig, plan))


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ({"decoder": {"tp": 2}}, []),
        ({"decoder": {"cp": 2}}, ["decoder.scan", "decoder.attend"]),
        ({"experts": {"ep": 2}}, ["experts.transport"]),
        ({"experts": {"etp": 2}}, ["experts.transport"]),
        (
            {"decoder": {"cp": 2}, "experts": {"ep": 4}},
            ["decoder.scan", "decoder.attend", "experts.transport"],
        ),
    ],
)
def test_what_is_shared_is_exchanged(plan: dict, settings: list[str]) -> None:
    run = run_of(**plan)
    found = list(exchanges(run, plan_of_run(run, 4)))
    assert [setting for _, setting, *_ in found] == settings
    assert all(sum(received[form]) > 0 for _, _, form, received, _ in found)
    assert ("exchanges of a layer" in as_text(show(run, plan_of_run(run, 4)))) == bool(settings)


def test_what_is_set_is_taken_and_what_is_not_is_cheapest() -> None:
    run = run_of(decoder={"cp": 2, "attend": "ring"}, experts={"ep": 4})
    attend, experts = list(exchanges(run, plan_of_run(run, 4)))[1:]
    assert attend[2] == "ring"
    assert sum(experts[3][experts[2]]) == min(map(sum, experts[3].values()))
    padded = run_of({"moe_capacity_factor": 1.0, "moe_pad_to_capacity": True}, experts={"ep": 4})
    assert [form for *_, form, _, _ in exchanges(padded, plan_of_run(padded, 4))] == ["all_to_all"]
