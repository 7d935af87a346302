"""The backward pass of whole models in two halves, B and W, against one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.tiny import batch, make
from weft.models.hybrid import HybridLM
from weft.ops.late import Late, attach
from weft.parallel.comm import SingleComm
from weft.train.objective import Totals, count, objective, to_device

LATE = ("qkv_proj.", "o_proj.", "in_proj.", "out_proj.", "up_proj", "down_proj", "latent_", "router.weight")
MODELS: dict[str, dict[str, object]] = {
    "attention": {"pattern": "**", "mtp_num_depths": 0},
    "mamba": {"pattern": "MM", "mtp_num_depths": 0},
    "mlp": {"pattern": "--", "mtp_num_depths": 0},
    "moe": {"pattern": "EE", "mtp_num_depths": 0},
    "not latent": {"pattern": "E", "mtp_num_depths": 0, "moe_latent_size": 0},
    "not shared": {"pattern": "E", "mtp_num_depths": 0, "moe_shared_expert_intermediate_size": 0},
    "capacity": {"pattern": "EE", "mtp_num_depths": 0, "moe_capacity_factor": 1.0},
    "padded": {
        "pattern": "EE",
        "mtp_num_depths": 0,
        "moe_capacity_factor": 1.0,
        "moe_pad_to_capacity": True,
        "router_global_aux_loss_coef": 1e-2,
    },
    "mtp": {"pattern": "M/*E", "mtp_num_depths": 1},
    "whole": {},  # its physical MTP depth runs twice
    "tied": {"tie_word_embeddings": True},
}


def is_late(name: str) -> bool:
    """Whether the gradient of a parameter is queued."""
    return any(part in name for part in (*LATE, "eh_proj"))


def losses(model: HybridLM, seeds: Sequence[int]) -> list[Tensor]:
    """The losses of some microbatches, whose forward passes are over."""
    depths = model.config.depths
    batches = [batch((11, 20, 7), seed, depths) for seed in seeds]
    totals: Totals = count(batches, SingleComm())
    return [objective(model, to_device(packed), totals, chunk=16)[0] for packed in batches]


def one_by_one(model: HybridLM, seeds: Sequence[int]) -> dict[str, Tensor]:
    for loss in losses(model, seeds):
        loss.backward()
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_two_halves_are_one_pass(name: str, recompute: bool) -> None:
    want = one_by_one(make(**MODELS[name]), [0])
    model, late = make(**MODELS[name]), Late()
    attach(model, late)
    model.set_recompute(recompute)
    with late.defer(0):
        losses(model, [0])[0].backward()
    for path, param in model.named_parameters():
        assert (param.grad is None) == is_late(path), path
        assert param.grad is None or torch.equal(param.grad, want[path]), path
    late.run(0)
    assert not len(late)
    for path, param in model.named_parameters():
        assert torch.equal(param.grad, want[path]), path


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_unsplit_is_as_without_a_queue(precision: str, recompute: bool) -> None:
    want = one_by_one(make(precision), [0, 1])
    model, late = make(precision), Late()
    attach(model, late)
    model.set_recompute(recompute)
    got = one_by_one(model, [0, 1])
    assert not len(late)
    assert all(torch.equal(got[path], want[path]) for path in want)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_microbatches_in_flight(order: tuple[int, ...], recompute: bool) -> None:
    """Three forward passes, then B in order with an unsplit pass between, then W in another order."""
    want = one_by_one(make(), [0, 1, 2, 3])
    model, late = make(), Late()
    attach(model, late)
    model.set_recompute(recompute)
    made = losses(model, [0, 1, 2, 3])
    for key, loss in enumerate(made[:3]):
        with late.defer(("0", key)):
            loss.backward()
    made[3].backward()
    for key in order:
        late.run(("0", key))
    assert not late.keys
    for path, param in model.named_parameters():
        torch.testing.assert_close(param.grad, want[path], rtol=1e-12, atol=1e-13, msg=path)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_cut_chain_of_stages(recompute: bool) -> None:
    """Gradients of inputs are whole after B alone: the stage before runs its B before any W of this one."""
    whole, cut = make(pattern="ME*-", mtp_num_depths=0), make(pattern="ME*-", mtp_num_depths=0)
    want = one_by_one(whole, [0])
    late = Late()
    attach(cut, late)
    cut.set_recompute(recompute)
    packed = batch((11, 20, 7), 0, 0)
    run, totals = to_device(packed), count([packed], SingleComm())
    ctx = cut.context(run.segments, places=run.places)
    x, ends = cut.embed(run.tokens), []
    for i, layer in enumerate(cut.layers.children()):
        start = x.detach().requires_grad_()
        ends.append((x, start))
        x = layer(start, ctx, f"layers.{i}")
    loss = cut.head([cut.norm(x)], run.future, [1 / totals.targets[0]], 16)[0]
    stats = ctx.stats["layers.1"]
    balance = (stats.balance + stats.z) / totals.tokens  # belongs to the graph of its stage
    with late.defer("head"):
        loss.backward()
    for stage, (out, start) in reversed(list(enumerate(ends))):
        roots = [(out, start.grad), *([(balance, None)] if stage == 2 else [])]
        with late.defer(stage):
            torch.autograd.backward(*map(list, zip(*roots, strict=True)))
    for key in late.keys:
        late.run(key)
    for path, param in cut.named_parameters():
        torch.testing.assert_close(param.grad, want[path], rtol=1e-12, atol=1e-13, msg=path)


@pytest.mark.gpu
def test_on_a_gpu_where_backward_passes_have_threads_of_their_own() -> None:
    device = torch.device("cuda")
    whole, split, late = make("fp32").to(device), make("fp32").to(device), Late()
    attach(split, late)
    split.set_recompute(True)
    packed = batch((11, 20, 7))
    totals = count([packed], SingleComm())
    objective(whole, to_device(packed, device), totals, chunk=16)[0].backward()
    loss = objective(split, to_device(packed, device), totals, chunk=16)[0]
    with late.defer(0):
        loss.backward()
    assert all((param.grad is None) == is_late(path) for path, param in split.named_parameters())
    late.run(0)
    for path, param in whole.named_parameters():
        torch.testing.assert_close(split.get_parameter(path).grad, param.grad, rtol=1e-4, atol=1e-5, msg=path)
