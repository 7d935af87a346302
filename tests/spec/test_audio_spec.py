"""Sizes of clips, what rows depend on, counts, and settings that cannot be."""

from dataclasses import replace

import pytest

from weft.models.presets import PARAKEET_OMNI, PARAKEET_OMNI_TINY
from weft.spec.audio import AudioConfig


def formula(frames: int, halvings: int) -> int:
    for _ in range(halvings):
        frames = (frames + 2 - 3) // 2 + 1
    return frames


@pytest.mark.parametrize("subsampling", [2, 4, 8])
def test_rows_are_the_convolutions_formula(subsampling: int) -> None:
    config = replace(PARAKEET_OMNI, subsampling=subsampling)
    for frames in range(1, 70):
        assert config.rows((frames,)) == config.outputs((frames,)) == formula(frames, config.halvings)
        assert config.heard((frames,)) == (formula(frames - 1, config.halvings) if frames > 1 else 0)


def readers(config: AudioConfig, length: int) -> dict[int, set[int]]:
    """Frames that each row depends on, by following every tap."""
    sets = {i: {i} for i in range(length)}
    for _ in range(config.halvings):
        sets = {
            i: set().union(*(sets.get(2 * i + tap, set()) for tap in (-1, 0, 1)))
            for i in range(formula(len(sets), 1) if sets else 0)
        }
    return sets


@pytest.mark.parametrize("closing", [0, 1])
def test_frames_of_a_piece_are_those_that_its_rows_read(closing: int) -> None:
    config = replace(PARAKEET_OMNI, closing=closing)
    for frames in (1, 2, 9, 16, 17, 18, 40, 65):
        read = readers(config, frames - closing)
        rows = config.rows((frames,))
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                wanted = set().union(*(read.get(row, set()) for row in range(start, stop)))
                first, last = config.frames(start, stop, (frames,))
                assert set(range(first, last)) == wanted


def test_published_encoder() -> None:
    assert list(PARAKEET_OMNI.problems()) == list(PARAKEET_OMNI_TINY.problems()) == []
    assert sum(spec.numel for spec in PARAKEET_OMNI.params() if not spec.buffer) == 624_084_992
    names = [spec.name for spec in PARAKEET_OMNI.params()]
    assert len(names) == len(set(names))
    rows, width, inner = 375, 1024, 4096  # half a minute
    products = 2 * rows * (4 * width * inner + 4 * width**2 + 3 * width**2 + 9 * width)
    distances = 2 * 2 * rows * width**2
    scores = 2 * width * (rows * rows + rows * 2 * rows + rows * rows)  # keys, distances, values
    assert PARAKEET_OMNI.flops(rows) == pytest.approx(24 * (products + distances + scores), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"subsampling": 6}, "subsampling"),
        ({"mels": 100}, "mels"),
        ({"conv_kernel": 8}, "conv_kernel"),
        ({"window": 600}, "window"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"hidden_size": 1023, "num_attention_heads": 1}, "hidden_size"),
    ],
)
def test_impossible_settings_say_so(changes: dict[str, int], where: str) -> None:
    assert where in [problem.path for problem in replace(PARAKEET_OMNI, **changes).problems()]
