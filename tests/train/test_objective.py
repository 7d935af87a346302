"""The loss and its parts on values known by hand."""

import math
from dataclasses import replace

import pytest
import torch

from tests.tiny import batch, make
from weft.nn.context import Context
from weft.ops.segments import Segments
from weft.parallel.comm import SingleComm
from weft.train.objective import count, objective, to_device

PLAIN = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "mtp_loss_scale": 0.7}


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_uniform_predictions_cost_the_log_of_the_vocabulary(depths: int) -> None:
    """Every depth's mean is log V, so the MTP loss is log V however many depths and targets there are."""
    model = make("fp64", mtp_num_depths=depths, **PLAIN)
    with torch.no_grad():
        model.head.weight.zero_()
    packed = batch((9, 4, 2), depths=depths)
    totals = count([packed], SingleComm())
    assert totals.targets == (12, 9, 7, 5)[: depths + 1]
    loss, parts, _ = objective(model, to_device(packed), totals, chunk=4)
    assert parts.tolist() == pytest.approx([math.log(61), math.log(61), 0, 0], rel=1e-12)
    assert loss.item() == pytest.approx(1.7 * math.log(61), rel=1e-12)


def test_mtp_loss_is_the_mean_over_depths_of_their_means() -> None:
    model = make("fp64", mtp_num_depths=2, **PLAIN)
    packed = batch((20, 7))
    packed = replace(packed, mask=packed.mask & (packed.tokens % 3 > 0))
    totals = count([packed], SingleComm())
    loss, parts, _ = objective(model, to_device(packed), totals, chunk=4)
    tokens, future, mask = (torch.from_numpy(a) for a in (packed.tokens, packed.future, packed.mask))
    with torch.no_grad():
        ctx = Context(Segments(packed.lengths))
        states = [model.hidden(tokens, ctx)]
        states += model.ahead(states[0], future, ctx)
        means = []
        for state, target, own in zip(states, future, mask, strict=True):
            logp = (state @ model.head.weight.T).log_softmax(-1)
            means.append(-logp[own].gather(1, target[own, None]).mean().item())
    assert parts[0].item() == pytest.approx(means[0], rel=1e-12)
    assert parts[1].item() == pytest.approx((means[1] + means[2]) / 2, rel=1e-12)
    assert loss.item() == pytest.approx(means[0] + 0.7 / 2 * (means[1] + means[2]), rel=1e-12)


def test_an_idle_router_costs_its_coefficients() -> None:
    """With equal scores sum f_i P_i is 1 for every document, and logsumexp of zeros is log E.

    One MoE layer of the stack and one in each of two repetitions of an MTP depth: three routers.
    """
    model = make("fp64", mtp_num_depths=2, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()
    packed = batch((9, 4))
    _, parts, _ = objective(model, to_device(packed), count([packed], SingleComm()), chunk=8)
    assert parts[2].item() == pytest.approx(3 * 0.5, rel=1e-12)
    assert parts[3].item() == pytest.approx(3 * 0.25 * math.log(8) ** 2, rel=1e-12)
