"""MTP logits and gradients, against a reference assembled from transformers' blocks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.parity.pairs import Pair
from tests.parity.test_parity_hybrid import check_gradients
from tests.tiny import CONFIG
from weft.nn.context import Context
from weft.ops.segments import Segments
from weft.spec.hybrid import HybridConfig

Make = Callable[[HybridConfig, int], Pair]
CASES = {
    "one depth": replace(CONFIG, pattern="ME*-/*E", mtp_num_depths=1),
    "one depth twice": replace(CONFIG, pattern="ME*-/*E", mtp_num_depths=2),
    "two depths": replace(CONFIG, pattern="ME*-/*E/*E", mtp_num_depths=2),
    "one depth twice, no latent": replace(CONFIG, moe_latent_size=0),
    "other inner layers": replace(CONFIG, pattern="M/M-", mtp_num_depths=2),
}


def shifted(row: torch.Tensor, ahead: int) -> torch.Tensor:
    """Row ``k - 1`` holds the token ``k`` places on, -1 where there is none."""
    long = torch.cat([row, torch.full((ahead,), -1)])
    return torch.stack([long[k : k + len(row)] for k in range(1, ahead + 1)])


@pytest.mark.parametrize("name", CASES)
def test_mtp(name: str, pair: Make) -> None:
    both = pair(CASES[name], 2)
    depths = both.config.depths
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 61, (n,), generator=generator) for n in (33, 12)]
    packed, segments = torch.cat(rows), Segments(tuple(map(len, rows)))
    future = torch.cat([shifted(row, depths + 1) for row in rows], dim=1)
    loss = torch.zeros(())
    scale = 0.3 / depths
    reference: list[list[torch.Tensor]] = []
    for row in rows:
        logits = both.theirs(row[None], use_cache=False).logits[0]
        loss = loss + F.cross_entropy(logits[:-1], row[1:], reduction="sum")
        ahead = both.mtp(both.theirs, row[None], depths)
        reference.append([depth[0].detach() for depth in ahead])
        for k, depth in enumerate(ahead, 1):
            loss = loss + scale * F.cross_entropy(depth[0, :-1], row[k + 1 :], reduction="sum")
    loss.backward()

    ctx = Context(segments)
    with torch.no_grad():
        states = both.ours.ahead(both.ours.hidden(packed, ctx), future, ctx)
        ours = [both.ours.head.logits(state) for state in states]
    for k in range(depths):
        theirs = torch.cat([found[k] for found in reference])
        starts = [0, len(rows[0])]
        mine = torch.cat([ours[k][s : s + len(r) - k - 1] for s, r in zip(starts, rows, strict=True)])
        assert theirs.std() >= 0.5
        assert (mine - theirs).abs().max() / theirs.std() <= 1e-4

    losses = both.ours.losses(
        packed, future, future >= 0, both.ours.context(segments), [1.0, *[scale] * depths]
    )
    total = losses.lm + sum(losses.mtp)
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=0)
    check_gradients(both)
