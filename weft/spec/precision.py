"""Precision policies: which numbers have which dtype."""

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Dtypes of one training run.

    Attributes:
        params: parameters and activations.
        master: the optimizer's copy of parameters, and its moments.
        accumulate: gradients while microbatches add up.
        reduce: gradients while ranks add up.
        logits: logits, softmax and loss.
        router: router logits and scores.
        ssm: Mamba-2 time steps, decays and state; ``A_log``, ``D``, ``dt_bias``.
    """

    params: Dtype
    master: Dtype
    accumulate: Dtype
    reduce: Dtype
    logits: Dtype
    router: Dtype
    ssm: Dtype

    def of(self, fp32: bool) -> Dtype:
        """Dtype of a parameter; ``fp32`` marks those kept out of reduced precision."""
        return self.master if fp32 else self.params


def _all(dtype: Dtype, params: Dtype | None = None) -> Precision:
    return Precision(params or dtype, dtype, dtype, dtype, dtype, dtype, dtype)


PRECISIONS: dict[str, Precision] = {
    "fp64": _all("float64"),
    "fp32": _all("float32"),
    "bf16": _all("float32", params="bfloat16"),
}
