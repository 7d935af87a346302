"""Precision policies: which numbers have which dtype."""

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float64", "float32", "bfloat16"]
ITEMSIZE: dict[Dtype, int] = {"float64": 8, "float32": 4, "bfloat16": 2}  # bytes


@dataclass(frozen=True)
class Precision:
    """Dtypes of one training run.

    Attributes:
        params: parameters and activations.
        master: the optimizer's copy of parameters, its moments, and gradients while microbatches and ranks
            add up; also the parameters that are never reduced (the router's bias, ``A_log``, ``D``,
            ``dt_bias``), whose dtype router scores, time steps and SSM states follow.
    """

    params: Dtype
    master: Dtype

    def of(self, fp32: bool) -> Dtype:
        """Dtype of a parameter; ``fp32`` marks those kept out of reduced precision."""
        return self.master if fp32 else self.params


PRECISIONS: dict[str, Precision] = {
    "fp64": Precision("float64", "float64"),
    "fp32": Precision("float32", "float32"),
    "bf16": Precision("bfloat16", "float32"),
}
