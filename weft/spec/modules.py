"""The modules of a run: the decoder and its encoders, what each of them holds, and what is trained.

A projector belongs to its encoder, or lies with the decoder where that sends fewer bytes: of a frozen encoder
and its projector the narrower side crosses. Names of parameters are those of their own module; ``full`` gives
the one that a checkpoint has, which does not depend on where a projector lies.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from weft.spec.encoder import EncoderConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.param import ParamSpec

DECODER = "decoder"
FORM = re.compile(r"[A-Za-z]\w*")
RESERVED = (DECODER, "experts", "schedule", "embed", "layers", "norm", "head", "mtp", "projectors")
"""Words that a plan or a decoder uses."""
_MOVED = "projectors."


@dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        name: DECODER, or that of an encoder.
        config: what it is.
        moved: encoders whose projectors lie here (in the decoder), or whether its own lies elsewhere.
        freeze: as in the settings.
    """

    name: str
    config: HybridConfig | EncoderConfig
    moved: Mapping[str, EncoderConfig] = field(default_factory=dict[str, EncoderConfig])
    freeze: tuple[str, ...] = ()

    @cached_property
    def params(self) -> tuple[ParamSpec, ...]:
        """Everything that it holds, under its own names."""
        if self.name != DECODER:
            specs = self.config.params()
            return tuple(s for s in specs if not (self.moved and s.name.startswith("projector.")))
        others = (
            spec.under(f"{_MOVED}{name}")
            for name, one in self.moved.items()
            for spec in one.projector.params()
        )
        return (*self.config.params(), *others)

    def full(self, name: str) -> str:
        """The name that a checkpoint has for a parameter."""
        if self.name != DECODER:
            return f"{self.name}.{name}"
        if not name.startswith(_MOVED):
            return name
        encoder, _, rest = name.removeprefix(_MOVED).partition(".")
        return f"{encoder}.projector.{rest}"

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        first, _, rest = self.full(name).partition(".")
        if self.name == DECODER and not name.startswith(_MOVED):
            return DECODER not in self.freeze
        part = "projector" if rest.startswith("projector.") else "body"
        return first not in self.freeze and f"{first}.{part}" not in self.freeze

    @cached_property
    def frozen(self) -> bool:
        """Whether nothing here is trained."""
        return not any(self.trains(spec.name) for spec in self.params if not spec.buffer)


@dataclass(frozen=True)
class Modules:
    """Decoder and encoders.

    Attributes:
        decoder: reads their rows.
        encoders: by name.
        freeze: what is not trained.
        together: encoders whose projectors must stay with them (a layout says why).
    """

    decoder: HybridConfig
    encoders: Mapping[str, EncoderConfig] = field(default_factory=dict[str, EncoderConfig])
    freeze: tuple[str, ...] = ()
    together: bool = False

    @cached_property
    def moved(self) -> Mapping[str, EncoderConfig]:
        """Encoders whose projectors lie with the decoder."""
        return {
            name: one
            for name, one in self.encoders.items()
            if (name in self.freeze or f"{name}.body" in self.freeze)
            and one.feature_width < one.output_size
            and not (one.together or self.together)
        }

    @cached_property
    def all(self) -> Mapping[str, Module]:
        """Encoders, then the decoder."""
        found = {
            name: Module(name, one, {name: one} if name in self.moved else {}, self.freeze)
            for name, one in self.encoders.items()
        }
        return {**found, DECODER: Module(DECODER, self.decoder, self.moved, self.freeze)}

    def width(self, encoder: str) -> int:
        """Numbers of a row that crosses from an encoder to the decoder."""
        one = self.encoders[encoder]
        return one.feature_width if encoder in self.moved else one.output_size

    def params(self) -> tuple[ParamSpec, ...]:
        """Everything, under the names that a checkpoint has: the decoder first."""
        specs = list(self.decoder.params())
        for name, one in self.encoders.items():
            specs += [spec.under(name) for spec in one.params()]
        return tuple(specs)
