"""Forty more random models of the family against transformers; the short suite draws eight."""

import pytest
import torch

from tests.parity.pairs import Pair, gather, live_tensors
from tests.parity.test_parity_hybrid import CONFIGS, Make, Texts, compare_pair, draw
from weft.build.model import assemble_from, tensors

FIRST = sum(name.startswith("random") for name in CONFIGS)  # seeds below this are in the short suite
CLOSE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + 40))
def test_random_model(seed: int, pair: Make) -> None:
    """Gradients to 1e-4 of their norm, or no farther from fp64 than four times what transformers is.

    The gradient of a per-head scalar may cancel to a thousandth of its terms; fp32 then leaves fewer digits
    on both sides, and fp64 tells how many.
    """
    both = pair(draw(seed), seed)
    texts = compare_pair(both)
    theirs = gather(both.config, live_tensors(both.theirs, None, gradients=True))
    ours = {name: p.grad for name, p in both.ours.named_parameters() if p.grad is not None}
    assert len(ours) == len(list(both.ours.parameters()))
    apart = {name: distance(ours[name], theirs[name]) for name in ours}
    assert all(value == value for value in apart.values())
    far = {name for name, value in apart.items() if value > CLOSE}
    exact = exact_gradients(both, texts) if far else {}
    for name in far:
        mine, other = distance(ours[name], exact[name]), distance(theirs[name], exact[name])
        assert mine <= max(CLOSE, 4 * other), f"{name}: {mine:.1e} from fp64, transformers {other:.1e}"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``b``."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def exact_gradients(both: Pair, texts: Texts) -> dict[str, torch.Tensor]:
    """Gradients of our model in fp64."""
    values = tensors(both.ours, both.config)
    model = assemble_from(both.config, "fp64", torch.device("cpu"), lambda name, _: values[name])
    packed, future, segments = texts
    model.losses(packed, future, future >= 0, model.context(segments), [1.0]).lm.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
