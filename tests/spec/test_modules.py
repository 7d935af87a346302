"""Where projectors lie, what is trained, and the names that checkpoints have, whatever a layout does."""

from collections import Counter
from dataclasses import replace

import pytest

from weft.models.presets import NEMOTRON3_NANO_OMNI, NEMOTRON3_NANO_OMNI_TINY
from weft.spec.count import count_parts
from weft.spec.modules import DECODER, Modules

TINY = NEMOTRON3_NANO_OMNI_TINY
WIDE = {"vision": 128, "audio": 32}  # features of the tiny encoders; the decoder has 64
FREEZES = [
    (),
    ("decoder",),
    ("vision",),
    ("audio",),
    ("vision.body", "audio.body"),
    ("vision.projector", "audio.projector"),
    ("decoder", "vision.body", "audio.body"),
    ("decoder", "vision", "audio"),
]


def words(name: str) -> set[str]:
    """What may be frozen, of which any freezes this parameter; ``name`` as checkpoints have it."""
    first, _, rest = name.partition(".")
    if first not in TINY.encoders:
        return {DECODER}
    return {first, f"{first}.projector" if rest.startswith("projector.") else f"{first}.body"}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("freeze", FREEZES)
def test_every_parameter_lies_in_one_module(freeze: tuple[str, ...], together: bool) -> None:
    made = replace(TINY, freeze=freeze, together=together)
    held = [(spec, m) for m in made.all.values() for spec in m.params]
    names = Counter(module.full(spec.name) for spec, module in held)
    assert names == Counter(spec.name for spec in TINY.params())
    shapes = {spec.name: spec.shape for spec in TINY.params()}
    for spec, module in held:
        full = module.full(spec.name)
        assert spec.shape == shapes[full]
        assert module.trains(spec.name) == (not words(full) & set(freeze)), full
    for module in made.all.values():
        trained = [spec for spec in module.params if not spec.buffer]
        assert module.frozen == all(words(module.full(spec.name)) & set(freeze) for spec in trained)


def test_the_decoder_comes_first_in_checkpoints_and_last_in_a_pass() -> None:
    assert list(TINY.all) == ["vision", "audio", DECODER]
    assert [spec.name for spec in TINY.params()][: len(TINY.decoder.params())] == [
        spec.name for spec in TINY.decoder.params()
    ]


@pytest.mark.parametrize("freeze", FREEZES)
def test_a_projector_moves_where_that_sends_less(freeze: tuple[str, ...]) -> None:
    """Only of a frozen encoder: the features of another need their gradients."""
    made = replace(TINY, freeze=freeze)
    still = {name for name in TINY.encoders if {name, f"{name}.body"} & set(freeze)}
    assert set(made.moved) == {name for name in still if WIDE[name] < 64} == still & {"audio"}
    for name in TINY.encoders:
        assert made.width(name) == (WIDE[name] if name in made.moved else 64)
        own = {spec.name.partition(".")[0] for spec in made.all[name].params}
        assert ("projector" in own) == (name not in made.moved)
    assert not replace(made, together=True).moved


def test_a_video_that_is_pruned_keeps_its_projector() -> None:
    """Which rows are dropped is decided after it."""
    vision = replace(TINY.encoders["vision"], output_size=256)
    decoder = replace(TINY.decoder, hidden_size=256)
    made = Modules(decoder, {"vision": vision}, ("vision",))
    assert set(made.moved) == {"vision"}
    assert not replace(made, encoders={"vision": replace(vision, pruning=0.5)}).moved


@pytest.mark.parametrize("made", [TINY, NEMOTRON3_NANO_OMNI])
def test_parts_add_up(made: Modules) -> None:
    found = dict.fromkeys((DECODER, "vision.body", "vision.projector", "audio.body", "audio.projector"), 0)
    for spec in made.params():
        (part,) = words(spec.name) & found.keys()
        found[part] += spec.numel
    assert count_parts(made) == found
