"""The learning rate of every step, as a pure function.

The formulas are those of Megatron-LM (``megatron/core/optimizer_param_scheduler.py``, ``get_lr``) with an
initial rate of 0. Write ``w`` for the warm-up steps, ``e`` for the step at which the decay ends, ``d`` for
the steps of the WSD decay, ``peak`` and ``low`` for ``optimizer.lr`` and ``optimizer.min_lr``. Step ``t``
has the rate

- ``peak * t / w``                   while ``t <= w`` (linear warm-up);
- ``peak``                           afterwards, if the style is ``constant``;
- ``low``                            after step ``e``;
- ``low + (peak - low) * shape(r)``  between, with the progress ``r`` of the decay, from 0 to 1:
  ``(t - w) / (e - w)`` for ``cosine`` and ``linear``, ``max(0, t - (e - d)) / d`` for ``WSD``.

The shapes fall from 1 to 0: ``linear`` is ``1 - r``, ``cosine`` is ``(1 + cos(pi r)) / 2``, ``exponential``
is ``2 * 0.5^r - 1`` (halving, shifted to end at 0) and ``minus_sqrt`` is ``1 - sqrt(r)``.
"""

import math
from collections.abc import Callable

from weft.spec.run import OptimizerConfig, SchedulerConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}


def learning_rate(
    step: int, optimizer: OptimizerConfig, scheduler: SchedulerConfig, train_iters: int
) -> float:
    """Learning rate of one step.

    Args:
        step: number of the optimizer step, counted from 1, so that the first step of a warm-up moves and the
            last step of a decay has the final rate. (Megatron evaluates the same curve one step later: its
            first warm-up step has rate 0.)
        optimizer: gives ``lr`` (the peak) and ``min_lr``.
        scheduler: gives the shape; ``lr_decay_iters = 0`` ends the decay at ``train_iters``,
            ``lr_wsd_decay_iters = 0`` decays over the last fifth, or what the warm-up leaves of it.
        train_iters: steps of the run.
    """
    peak, low, warm = optimizer.lr, optimizer.min_lr, scheduler.lr_warmup_iters
    if warm > 0 and step <= warm:
        return peak * step / warm
    if scheduler.lr_decay_style == "constant":
        return peak
    end = scheduler.lr_decay_iters or train_iters
    if step > end:
        return low
    if scheduler.lr_decay_style == "WSD":
        decay = scheduler.lr_wsd_decay_iters or min(max(1, end // 5), end - warm)
        progress, shape = max(0.0, (step - (end - decay)) / decay), scheduler.lr_wsd_decay_style
    else:
        progress, shape = (step - warm) / (end - warm), scheduler.lr_decay_style
    return low + (peak - low) * _SHAPES[shape](progress)
