"""A plan as text and as a picture."""

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.tiny import CONFIG
from weft.config.load import from_dict
from weft.plan.layout import plan_of_run
from weft.plan.picture import svg
from weft.plan.show import show, summary
from weft.plan.table import as_text, bytes_words
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.layout import PlanConfig
from weft.spec.run import RunConfig

GOLDEN = """\
decoder: 4 ranks, tp 2 x tp_embed 2
  axis      size  groups  ranks
  tp        2     2       [0 2]  [1 3]
  tp_embed  2     2       [0 1]  [2 3]

  rank = 2 x tp + tp_embed
  tp 0 tp_embed 0  tp 0 tp_embed 1  tp 1 tp_embed 0  tp 1 tp_embed 1
  0                1                2                3

experts: 4 ranks, edp 2 x ep 2
  axis  size  groups  ranks
  edp   2     2       [0 2]  [1 3]
  ep    2     2       [0 1]  [2 3]

  rank = 2 x edp + ep
         ep 0  ep 1
  edp 0  0     1
  edp 1  2     3

parameters, as the first rank of their stage holds them
  unit             parameter                shape    cut                                       here    copies
  token table      weight                   61 x 16  vocab/(tp x tp_embed), embed              16 x 16  1
  Attention layer  norm.weight              16       embed/tp_embed                            8        2
                   mixer.qkv_proj.weight    64 x 16  heads/tp + kv_heads/tp, embed/tp_embed    32 x 8   1
"""


def run_of(**plan: Any) -> RunConfig:
    base = stdlib_lm()
    return replace(
        base, model=replace(CONFIG, pattern="*E", mtp_num_depths=0), plan=from_dict(PlanConfig, plan)
    )


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_golden() -> None:
    run = run_of(decoder={"tp": 2, "tp_embed": 2}, experts={"ep": 2})
    text = as_text(show(run, plan_of_run(run, 4)))
    assert lines(text)[: len(lines(GOLDEN))] == lines(GOLDEN)
    assert ["mixer.experts.up_proj", "8", "x", "12", "x", "8", "experts/ep,", "expert_mlp,", "latent"] in [
        line[:9] for line in lines(text)
    ]
    assert all(line == line.rstrip() and len(line) < 140 for line in text.splitlines())


def test_copies_and_shared_heads() -> None:
    run = run_of(decoder={"tp": 4})
    found = [line for line in as_text(show(run, plan_of_run(run, 8))).splitlines() if "qkv_proj" in line]
    assert found[0].split("  ")[-1].strip() == "2, 4"
    assert "heads/tp + kv_heads/tp (shared by 2), embed" in found[0]


@pytest.mark.parametrize("ranks", [1, 2, 12, 4096])
def test_pictures_of_few_and_many(ranks: int) -> None:
    run = run_of(decoder={"tp": min(ranks, 2), "pp": 2 if ranks > 2 else 1})
    plan = plan_of_run(run, ranks)
    drawn = ElementTree.fromstring(svg(plan))
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 1 + 2 * ranks
    boxes = [
        (rect.get("x"), rect.get("y"))
        for group in drawn.findall("{http://www.w3.org/2000/svg}g")
        for rect in group.findall("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(set(boxes)) == ranks
    assert boxes[:ranks] == boxes[ranks:]
    assert len(as_text(show(run, plan)).splitlines()) < 70
    assert f"{ranks:,}" in as_text([summary(run, plan)])


def test_ranks_out_of_order_are_a_list() -> None:
    run = run_of(decoder={"ranks": "2-3,0-1", "tp": 2})
    text = as_text(show(run, plan_of_run(run, 4)))
    assert "place in the list of ranks = 2 x dp + tp" in text
    assert ["dp", "0", "2", "3"] in lines(text)


def test_sizes_in_words() -> None:
    assert [bytes_words(n) for n in (0, 512, 1536, 3 << 30, 5 << 40)] == [
        "0 B", "512 B", "1.5 KiB", "3 GiB", "5 TiB",
    ]  # fmt: skip
