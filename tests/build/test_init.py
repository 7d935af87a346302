"""Initial values: by name and index, of the scale and kind that their specs say."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import CONFIG
from weft.build import init
from weft.build.init import initial
from weft.spec.hybrid import HybridConfig
from weft.spec.param import Init, ParamSpec, dim

F32, F64 = torch.float32, torch.float64


def spec(*shape: int, start: Init, name: str = "w") -> ParamSpec:
    return ParamSpec(name, tuple(dim(f"axis{i}", n) for i, n in enumerate(shape)), start)


def start_of(name: str, config: HybridConfig = CONFIG) -> Init:
    return next(p.init for p in config.params() if p.name == name)


@pytest.mark.parametrize("start", [Init("normal", 0.02), Init("uniform", 0.5)])
def test_any_block_can_be_drawn_alone(start: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK", 3 * 8)  # three rows
    whole = initial(spec(8, 8, start=start), 5, F32)
    blocks = [
        init._draw(start, (rows, 8), top, init._generator(5, "w", top))
        for top, rows in ((0, 3), (3, 3), (6, 2))
    ]
    assert torch.equal(whole, torch.cat(blocks))
    assert not torch.equal(blocks[0], blocks[1])


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_decays_do_not_depend_on_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK", block)
    values = initial(spec(64, start=Init("log_arange")), 0, F32)
    wanted = torch.tensor([math.log(h) for h in range(1, 65)])
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=0)
    assert values[0] == 0


def test_values_depend_on_seed_and_name_and_on_nothing_else() -> None:
    start = Init("normal", 1.0)
    base = initial(spec(4, 6, start=start), 1, F32)
    assert torch.equal(initial(spec(4, 6, start=start), 1, F64), base.double())
    assert torch.equal(initial(spec(4, 6, start=start), 1, torch.bfloat16), base.bfloat16())
    assert not torch.equal(initial(spec(4, 6, start=start), 2, F32), base)
    assert not torch.equal(initial(spec(4, 6, start=start, name="v"), 1, F32), base)


def test_scale() -> None:
    """A quarter of a million draws: the mean to 4 standard errors, the deviation to 1%."""
    normal = initial(spec(512, 512, start=Init("normal", 0.02)), 0, F64)
    assert normal.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(normal.mean().item()) < 4 * 0.02 / 512
    uniform = initial(spec(512, 512, start=Init("uniform", 0.5)), 0, F64)
    assert uniform.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.01)
    assert uniform.abs().max() <= 0.5


@pytest.mark.parametrize(("low", "high", "floor"), [(1e-3, 0.1, 1e-4), (1e-3, 0.1, 0.03)])
def test_time_steps_lie_between_their_bounds(low: float, high: float, floor: float) -> None:
    bias = initial(spec(4096, start=Init("dt_bias", low=low, high=high, floor=floor)), 0, F64)
    steps = F.softplus(bias)
    assert steps.min() >= max(low, floor) * (1 - 1e-5)
    assert steps.max() <= high * (1 + 1e-5)
    if floor < low:  # log-uniform: half of the draws lie below the geometric mean
        below = (steps < math.sqrt(low * high)).double().mean().item()
        assert below == pytest.approx(0.5, abs=0.04)
    else:
        assert (steps < floor * (1 + 1e-5)).any()


@pytest.mark.parametrize("latent", [0, 8])
@pytest.mark.parametrize("rescale", [True, False])
def test_projections_to_the_residual_are_smaller(latent: int, rescale: bool) -> None:
    """By one over the root of the number of layers; inside the latent width nothing is."""
    config = replace(CONFIG, pattern="ME*-M*-ME", moe_latent_size=latent, mtp_num_depths=0)
    config = replace(config, rescale_prenorm_residual=rescale)
    out = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "latent_up.weight")
    out = out if latent else (*out, "experts.down_proj")
    matrices = [p for p in config.params() if p.init.kind == "normal"]
    small = {p.name for p in matrices if p.name.endswith(out)}
    assert len(small) == 3 + 2 + 2 + 2 * (2 if not latent else 1) + (2 if latent else 0)
    for p in matrices:
        wanted = CONFIG.initializer_range / (3.0 if rescale and p.name in small else 1.0)
        assert p.init.scale == pytest.approx(wanted, rel=1e-12), p.name


def test_kinds() -> None:
    assert start_of("layers.0.mixer.A_log").kind == "log_arange"
    assert start_of("layers.0.mixer.D").kind == start_of("layers.0.norm.weight").kind == "ones"
    assert start_of("layers.1.mixer.router.bias").kind == "zeros"
    bias = start_of("layers.0.mixer.dt_bias")
    assert (bias.kind, bias.low, bias.high, bias.floor) == ("dt_bias", 1e-3, 0.1, 1e-4)
    assert start_of("layers.0.mixer.conv.weight").scale == CONFIG.conv_kernel**-0.5
