"""Model FLOPs utilization: useful arithmetic per second, as a share of what the device can do.

The arithmetic of the model itself is counted in ``weft.spec.count.training_flops_per_token``.
"""

import math
import time

import torch

from weft.config.errors import RunError

_SIDE = {"cpu": 1024, "cuda": 8192}


def utilization(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Tokens/s times FLOPs per token over the peak (FLOP/s) of all devices together; 1 is all of it.

    Raises:
        RunError: the peak is not a positive number.
    """
    if not peak_flops > 0:
        raise RunError(
            f"the device's peak is {peak_flops} FLOP/s; set logger.peak_flops to a positive number"
        )
    return tokens_per_second * flops_per_token / peak_flops


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product: the rate that training is compared with.

    The best of the products that fit in ``seconds`` (after one that warms up), because other work on the
    machine only makes one slower. It is below a data sheet's figure, so utilization against it is higher.
    """
    side = _SIDE.get(device.type, _SIDE["cuda"])
    matrix = torch.full((side, side), 0.5, device=device, dtype=dtype)
    _product(matrix)
    best, deadline = math.inf, time.perf_counter() + seconds
    while math.isinf(best) or time.perf_counter() < deadline:
        best = min(best, _product(matrix))
    return 2.0 * side**3 / best


def _product(matrix: torch.Tensor) -> float:
    """Seconds of one product; work queued on a GPU is waited for before and after."""
    wait = torch.cuda.synchronize if matrix.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    wait()
    return time.perf_counter() - start
