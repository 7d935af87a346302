"""The pattern language of hybrid stacks: one letter per layer, ``/`` starts an MTP depth."""

from collections.abc import Iterator
from dataclasses import dataclass

SYMBOLS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "mixture of experts"}


@dataclass(frozen=True)
class Pattern:
    """``main`` layers and one inner pattern per physical MTP depth."""

    main: str
    mtp: tuple[str, ...] = ()


def parse(text: str) -> Pattern:
    """Split ``MEM*E/*E`` into the main stack and its MTP depths; call ``faults`` first."""
    main, *mtp = text.split("/")
    return Pattern(main, tuple(mtp))


def faults(text: str) -> Iterator[str]:
    """What is wrong with a pattern, one message each."""
    for place, letter in enumerate(text):
        if letter not in SYMBOLS and letter != "/":
            known = ", ".join(f"{s!r} {name}" for s, name in SYMBOLS.items())
            fix = f"use {known}, or '/' before an MTP depth"
            yield f"unknown letter {letter!r} at position {place} of {text!r}; {fix}"
    main, *mtp = text.split("/")
    if not main:
        yield f"{text!r} has no main layers"
    if any(not depth for depth in mtp):
        yield f"{text!r} has an empty MTP depth; write its layers after '/'"
    if len(set(mtp)) > 1:
        yield f"{text!r} has MTP depths of different patterns; they must be alike"
