"""Cross-entropy of a linear output head, without ever holding all logits."""

from jaxtyping import Float, Int
from torch import Tensor

from weft.ops.backend import pick
from weft.ops.cross_entropy import fast, reference

LOSS_BACKENDS = {"reference": reference.linear_cross_entropy, "fast": fast.linear_cross_entropy}
NLL_BACKENDS = {"reference": reference.linear_nll, "fast": fast.linear_nll}


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens embed"],
    weight: Float[Tensor, "vocab embed"],
    targets: Int[Tensor, " tokens"],
    chunk: int = 1024,
    scale: float = 1.0,
) -> Float[Tensor, ""]:
    """``scale`` times the sum of ``-log softmax(hidden weight^T)[target]`` over targets >= 0.

    Logits, softmax and the weight's gradient are fp32 (fp64 for fp64). Gradients are formed in the
    forward pass, ``chunk`` tokens at a time, so at most ``chunk * vocab`` logits exist.
    """
    return pick("cross_entropy", LOSS_BACKENDS)(hidden, weight, targets, chunk, scale)


def linear_nll(
    hidden: Float[Tensor, "tokens embed"],
    weight: Float[Tensor, "vocab embed"],
    targets: Int[Tensor, " tokens"],
    chunk: int = 1024,
) -> Float[Tensor, " tokens"]:
    """Loss of each token, 0 where the target is negative; carries no gradient."""
    return pick("cross_entropy", NLL_BACKENDS)(hidden, weight, targets, chunk)
