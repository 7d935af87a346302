"""What executed routes receive is what the plan says, and no more than must travel."""

import pytest
import torch

from benchmarks import boundary as published
from tests.gangs import threads
from tests.plan.routes import lower_bound
from weft.parallel.comm import Comm
from weft.parallel.ledger import record
from weft.parallel.route import Channel
from weft.plan.route import compile_route, transpose
from weft.plan.runs import Run
from weft.plan.traffic import Axes, Boundary, Traffic, compared, direct, ends, gather, leader

IMAGES = (Run(0, 5), Run(8, 3), Run(14, 9))
PAIRS = {
    "shared": (Axes(dp=4), Axes(tp=2, dp=2)),
    "shared, context": (Axes(dp=8), Axes(tp=2, cp=4)),
    "shared, pipeline": (Axes(dp=8), Axes(tp=2, pp=2, dp=2)),
    "overlapping": (Axes(dp=4), Axes(tp=2, cp=2, first=2)),
    "apart": (Axes(dp=4), Axes(tp=2, dp=2, first=4)),
    "three to two": (Axes(dp=3), Axes(tp=2, dp=2, first=3)),
    "two to three": (Axes(tp=2), Axes(dp=3, cp=2, first=2)),
    "encoder with all axes": (Axes(tp=2, cp=2, pp=2), Axes(cp=2, first=3)),
    "encoder context to pipeline": (Axes(cp=3), Axes(tp=3, pp=2, first=2)),
    "one to one": (Axes(), Axes(first=1)),
}


def between(encoder: Axes, decoder: Axes, size: int = 0) -> Boundary:
    """Some images, or ``size`` rows of a byte."""
    return Boundary("", encoder, decoder, size or 24, (Run(0, size),) if size else IMAGES, 1 if size else 24)


@pytest.mark.parametrize("name", PAIRS)
def test_the_ledger_is_what_the_plan_says(name: str) -> None:
    source, target = ends(between(*PAIRS[name]))
    route = compile_route(source, target)
    width, size = 3, 8

    def work(comm: Comm) -> list[int]:
        way, told = Channel(comm, (width,), torch.float64, torch.device("cpu")), []
        for leg in (route, transpose(route)):
            with record(comm) as ledger:
                way.post(leg, torch.zeros(leg.sources.get(comm.rank, 0), width, dtype=torch.float64)).wait()
            told.append(ledger.bytes())
        return told

    there, back = zip(*threads(8, work), strict=True)
    plan = direct(route, width * size)
    assert (sum(there), max(there)) == (plan.forward, plan.forward_rank)
    assert (sum(back), max(back)) == (plan.backward, plan.backward_rank)
    every = sum(run.length for run in IMAGES) * PAIRS[name][1].dp
    assert plan.forward == width * size * lower_bound(source, target, every)


def of(way: Traffic | None) -> list[int]:
    assert way is not None
    return [way.forward, way.backward, way.forward_rank, way.backward_rank]


def test_formulas() -> None:
    """Of 1,600 bytes: 1B + 7B at 64K with one decoder replica, and others."""
    wide = between(Axes(dp=16), Axes(tp=2, cp=8), 1600)
    assert of(leader(wide)) == [16 * 1600, (7 + 1) * 1600, 1600, 7 * 1600]
    assert of(gather(wide)) == [16 * 1500, 0, 1500, 0]
    assert of(leader(between(Axes(tp=4, first=9), Axes(tp=2, dp=2), 1600)))[1] == 2 * (1 + 3) * 1600
    assert of(gather(between(Axes(dp=16), Axes(tp=2, pp=2, dp=4), 1600))) == [16 * 1200, 0, 1200, 0]
    apart = between(Axes(dp=3), Axes(dp=2, first=3))
    assert leader(apart) is gather(apart) is None


def test_published_configurations() -> None:
    """A row for each in the document; what a rank receives is at most its own tokens."""
    told = published.boundaries()
    text = published.OUT.read_text()
    for way in ("forward", "backward"):
        assert published.markdown(compared(told, way)) in text
    for at in told:
        traffic = direct(compile_route(*ends(at)), at.row)
        assert traffic.forward <= at.size * at.decoder.dp
        assert traffic.forward_rank <= at.row * -(-at.tokens // at.decoder.wide)
