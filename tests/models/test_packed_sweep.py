"""Packed documents equal separate ones, over random models and random lengths, in fp64."""

import random
from dataclasses import fields, replace

import pytest
import torch

from tests.models.test_hybrid import gradients
from tests.parity.test_parity_hybrid import draw
from tests.tiny import batch, make, split
from weft.parallel.comm import SingleComm
from weft.spec.hybrid import HybridConfig
from weft.train.objective import count, objective, to_device


def with_mtp(seed: int) -> tuple[HybridConfig, tuple[int, ...]]:
    """A random model with MTP depths and router losses, and lengths of its documents."""
    rng = random.Random(1000 + seed)
    depth = rng.choice(["*E", "M", "M-", "E"])
    depths = rng.choice([1, 2, 3])
    parts = rng.choice([1, depths])
    config = draw(seed)
    config = replace(
        config,
        pattern="/".join([config.pattern, *[depth] * parts]),
        mtp_num_depths=depths,
        router_aux_loss_coef=1e-2,
        router_z_loss_coef=1e-3,
    )
    return config, (*(rng.randint(1, 40) for _ in range(rng.randint(1, 6))), 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_packed_equals_separate(seed: int) -> None:
    config, lengths = with_mtp(seed)
    packed = batch(lengths, seed, config.depths, config.vocab_size)
    totals = count([packed], SingleComm())
    model = make(**{f.name: getattr(config, f.name) for f in fields(config)})
    loss, parts, _ = objective(model, to_device(packed), totals, chunk=17)
    loss.backward()
    together = gradients(model)
    model.zero_grad()
    sums = torch.zeros_like(parts)
    for document in split(packed):
        loss, share, _ = objective(model, to_device(document), totals, chunk=5)
        loss.backward()
        sums += share
    torch.testing.assert_close(sums, parts, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-9, atol=1e-11, msg=name)
