"""Initial values: functions of (seed, name, global index), never of the layout.

A parameter is drawn in blocks of rows, each from a generator seeded by (seed, name, block), so a
rank can draw any box of a parameter without drawing the rest.
"""

import hashlib
import math

import torch
from jaxtyping import Shaped
from torch import Tensor

from weft.plan.box import Box
from weft.spec.param import Init, ParamSpec

BLOCK = 1 << 20  # elements drawn from one generator


def initial(spec: ParamSpec, seed: int, dtype: torch.dtype, box: Box | None = None) -> Shaped[Tensor, "..."]:
    """A box of the parameter; all of it by default.

    Values are drawn in fp32 on the CPU, then cast: devices agree, and precisions up to rounding.
    """
    box = box or Box.whole(spec.shape)
    rows = spec.shape[0]
    height = max(1, BLOCK * rows // max(1, spec.numel))
    first, last = box.start[0], box.stop[0]
    parts = []
    for top in range(first // height * height, max(last, first + 1), height):
        whole = _draw(
            spec.init, (min(height, rows - top), *spec.shape[1:]), top, _generator(seed, spec.name, top)
        )
        mine = slice(max(first - top, 0), max(last - top, 0))
        others = (slice(a, b) for a, b in zip(box.start[1:], box.stop[1:], strict=True))
        parts.append(whole[(mine, *others)].to(dtype))
    return torch.cat(parts)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _draw(init: Init, shape: tuple[int, ...], first_row: int, generator: torch.Generator) -> Tensor:
    match init.kind:
        case "normal":
            return torch.empty(shape).normal_(0.0, init.scale, generator=generator)
        case "uniform":
            return torch.empty(shape).uniform_(-init.scale, init.scale, generator=generator)
        case "ones":
            return torch.ones(shape)
        case "zeros":
            return torch.zeros(shape)
        case "log_arange":
            return torch.arange(first_row + 1, first_row + 1 + shape[0], dtype=torch.float32).log()
        case "dt_bias":
            spread = torch.empty(shape).uniform_(generator=generator)
            low, high = math.log(init.low), math.log(init.high)
            dt = (low + (high - low) * spread).exp().clamp_min(init.floor)
            return dt + (-torch.expm1(-dt)).log()  # inverse of softplus
