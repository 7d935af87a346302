"""What a model costs, counted from its spec: parameters, arithmetic, bytes. No tensor is made."""

from collections.abc import Iterable
from dataclasses import dataclass

from weft.spec.hybrid import BlockConfig, HybridConfig
from weft.spec.modules import DECODER, Modules
from weft.spec.param import ParamSpec
from weft.spec.precision import ITEMSIZE, PRECISIONS


@dataclass(frozen=True)
class Counts:
    """Elements of a model, the router's correction biases included (as published counts do).

    Attributes:
        main: elements outside the MTP depths.
        mtp: elements of the physical MTP depths.
        active: elements of the main stack that one token uses, token table and head included.
        active_mtp: elements that one token uses in the MTP depths, each physical depth once.
    """

    main: int
    mtp: int
    active: int
    active_mtp: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.main + self.mtp


def count(model: HybridConfig) -> Counts:
    """Elements of ``model``."""
    specs = model.params()
    mtp = _numel(spec for spec in specs if spec.name.startswith("mtp."))
    main = _numel(specs) - mtp
    idle_mtp = sum(_idle(depth.blocks) for depth in model.mtp)
    return Counts(main, mtp, main - _idle(model.blocks), mtp - idle_mtp)


def count_parts(modules: Modules) -> dict[str, int]:
    """Elements of the decoder and, of each encoder, of its projector and of all before it, by name.

    Names are those of parts that may be frozen: ``decoder``, ``vision.body``, ``vision.projector``. What is
    not trained (statistics of norms) counts too.
    """
    found = {DECODER: count(modules.decoder).total}
    for name, encoder in modules.encoders.items():
        projector = _numel(encoder.projector.params())
        found |= {
            f"{name}.body": _numel(encoder.params()) - projector,
            f"{name}.projector": projector,
        }
    return found


def mean_context(lengths: tuple[int, ...]) -> float:
    """Mean number of keys that a token sees, itself included, in documents of these lengths (tokens)."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def training_flops_per_token(model: HybridConfig, context: float) -> float:
    """Floating-point operations of one token's forward and backward pass, every trained MTP depth included.

    A backward pass counts as two forward passes; recomputed activations are not counted (Chowdhery et al.
    2022, PaLM, appendix B), nor are norms and elementwise functions.

    Args:
        model: the hybrid decoder.
        context: mean keys seen by a token (see ``mean_context``).
    """
    head = 2.0 * model.vocab_size * model.hidden_size
    joining = 4.0 * model.hidden_size**2
    forward = head + _flops(model.blocks, context)
    depths = [head + joining + _flops(depth.blocks, context) for depth in model.mtp]
    if depths:  # one physical depth may be trained several times
        forward += sum(depths) * model.depths / len(depths)
    return 3.0 * forward


@dataclass(frozen=True)
class StateBytes:
    """Bytes that training keeps for each element of a parameter.

    Attributes:
        weight: what layers read.
        gradient: sums over microbatches and ranks.
        master: the optimizer's copy, where layers read another dtype.
        moments: the two moments of AdamW.
    """

    weight: int
    gradient: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weight + self.gradient + self.master + self.moments


def state_of(spec: ParamSpec, precision: str) -> StateBytes:
    """What training keeps for each element of ``spec`` under a policy, named as in ``PRECISIONS``."""
    policy = PRECISIONS[precision]
    weight, master = ITEMSIZE[policy.of(spec.fp32)], ITEMSIZE[policy.master]
    if spec.buffer:
        return StateBytes(weight, 0, 0, 0)
    return StateBytes(weight, master, master if policy.of(spec.fp32) != policy.master else 0, 2 * master)


def state_bytes(model: HybridConfig, precision: str) -> int:
    """Bytes of everything that training keeps per parameter: weights, gradients, master copy, two moments.

    Args:
        model: the hybrid decoder.
        precision: a name of ``PRECISIONS``.
    """
    return sum(state_of(spec, precision).total * spec.numel for spec in model.params())


def _numel(specs: Iterable[ParamSpec]) -> int:
    return sum(spec.numel for spec in specs)


def _idle(blocks: Iterable[BlockConfig]) -> int:
    return sum(_numel(block.mixer.params()) - block.mixer.active() for block in blocks)


def _flops(blocks: Iterable[BlockConfig], context: float) -> float:
    return sum(block.mixer.flops_per_token(context) for block in blocks)
