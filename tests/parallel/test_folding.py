"""Experts over ranks that the decoder uses for tensor, context and data parallelism: MoE parallel folding.

arXiv 2504.14960. The sweep of plans (``test_plans.py``) has many more such grids; these are kept by name, on
processes.
"""

from dataclasses import replace

import pytest

from tests.gangs import Gangs
from tests.parallel import equal, plans

BASE = plans.Case(
    **{name: values[0] for name, values in plans.CHOICES.items()}
    | {"length": 11, "kv_heads": 2, "groups": 2, "packed": True, "mtp": "one", "level": 1}
)
LAYOUTS = {
    "tp=2 dp=2 ep=4": {"tp": 2, "dp": 2, "ep": 4},
    "cp=2 dp=2 ep=4": {"cp": 2, "dp": 2, "ep": 4},
    "tp=2 cp=2 ep=4": {"tp": 2, "cp": 2, "ep": 4},
    "dp=4 ep=2 etp=2": {"dp": 4, "ep": 2, "etp": 2},
}


@pytest.mark.parametrize("routing", ["dropless", "capacity", "sequence", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_equal_one(layout: str, routing: str, processes: Gangs) -> None:
    case = replace(BASE, **LAYOUTS[layout], routing=routing)
    assert not list(case.faults)
    found = processes(4).run("tests.parallel.equal:on_processes", equal.as_arguments(case))
    assert found == [[]] * 4
