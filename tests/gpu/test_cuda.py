"""One CUDA device against the CPU: parity, packing, decoding, resume. Skipped without a GPU."""

from pathlib import Path

import pytest
import torch

from tests.tiny import batch, make, split
from weft.infer.cache import make_cache
from weft.infer.generate import Sampling, generate
from weft.models.hybrid import HybridLM
from weft.ops.segments import Segments
from weft.parallel.comm import SingleComm
from weft.recipes.registry import build
from weft.train.objective import count, objective, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def step(model: HybridLM, lengths: tuple[int, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    packed = batch(lengths)
    loss = objective(
        model, to_device(packed, model.embed.weight.device), count([packed], SingleComm()), chunk=16
    )[0]
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-4)])
def test_gpu_equals_cpu(precision: str, tolerance: float) -> None:
    here, there = make(precision), make(precision).cuda()
    (loss, grads), (gpu_loss, gpu_grads) = step(here, (40, 9, 64)), step(there, (40, 9, 64))
    torch.testing.assert_close(gpu_loss, loss, rtol=tolerance, atol=tolerance)
    for name, gradient in grads.items():
        torch.testing.assert_close(gpu_grads[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def test_bf16_runs_and_is_near_fp32() -> None:
    (loss, _), (reduced, grads) = step(make("fp32").cuda(), (64, 64)), step(make("bf16").cuda(), (64, 64))
    torch.testing.assert_close(reduced, loss, rtol=5e-2, atol=5e-2)
    assert all(g.isfinite().all() for g in grads.values())


def test_packed_equals_separate() -> None:
    model = make("fp64").cuda()
    packed = batch((17, 30, 5))
    totals = count([packed], SingleComm())
    objective(model, to_device(packed, model.embed.weight.device), totals, chunk=16)[0].backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for document in split(packed):
        objective(model, to_device(document, model.embed.weight.device), totals, chunk=16)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, together[name], rtol=1e-10, atol=1e-12, msg=name)


def test_decode_equals_full() -> None:
    model = make("fp64", pattern="ME*-", mtp_num_depths=0).cuda()
    tokens = torch.randint(0, 61, (21,), device="cuda")
    with torch.inference_mode():
        whole = model.logits(tokens, Segments((21,)))
        cache = make_cache(model.config, 1, 21, torch.float64, torch.float64, tokens.device)
        parts = [model.logits(part, Segments((len(part),)), cache) for part in tokens.split([6, 1, 9, 1, 4])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-10)
    prompts = [[1, 2, 3], [4]]
    settings = Sampling(max_new_tokens=8)
    alone = generate(make("fp64", pattern="ME*-", mtp_num_depths=0), prompts, settings)
    assert generate(model, prompts, settings) == alone


def test_resume_is_bitwise(tmp_path: Path) -> None:
    from tests.train.runs import bits_after

    whole = bits_after(tmp_path / "whole", build("nemotron3_nano_30b_pretrain_tiny"), "cuda", stop=None)
    resumed = bits_after(tmp_path / "cut", build("nemotron3_nano_30b_pretrain_tiny"), "cuda", stop=3)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
