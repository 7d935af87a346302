"""Vision configs: block order, counts, and what is refused."""

from dataclasses import replace

import pytest

from weft.config.load import from_yaml, to_yaml
from weft.models.presets import CRADIO_V4_H, CRADIO_V4_H_TINY
from weft.spec.vision import VisionConfig, kept


@pytest.mark.parametrize(("merge", "rows", "cols"), [(1, 2, 3), (2, 2, 2), (2, 4, 6), (3, 6, 3)])
def test_block_order(merge: int, rows: int, cols: int) -> None:
    config = replace(CRADIO_V4_H_TINY, merge=merge)
    inside = [(i, j) for i in range(merge) for j in range(merge)]
    blocks = [(a, b) for a in range(0, rows, merge) for b in range(0, cols, merge)]
    assert config.order(rows, cols).tolist() == [(a + i) * cols + b + j for a, b in blocks for i, j in inside]


def test_a_grid_that_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match="4 x 3 patches .* 2 x 2"):
        CRADIO_V4_H_TINY.order(4, 3)


def test_sizes() -> None:
    assert CRADIO_V4_H.rows((1, 32, 32)) == 1034
    assert CRADIO_V4_H.outputs((2, 32, 32)) == 256
    assert CRADIO_V4_H.feature_width == 5120


@pytest.mark.parametrize(
    ("groups", "cells", "pruning", "rows"), [(8, 256, 0.7, 614), (3, 16, 0.9, 16), (1, 9, 0.5, 9)]
)
def test_kept(groups: int, cells: int, pruning: float, rows: int) -> None:
    assert kept(groups, cells, pruning) == rows
    assert kept(groups, cells, 0.0) == groups * cells


def test_parameters_of_the_published_encoder() -> None:
    """ViT-H/16: layers of 12 h^2 and their vectors; two projections; a table of 128 x 128 positions."""
    h = 1280
    layer = 12 * h**2 + 3 * h + h + 4 * h + h + 4 * h
    tower = 32 * layer + 3 * 768 * h + 128**2 * h + 10 * h
    projector = 4 * h + 4 * h * 20480 + 20480 * 2688
    assert sum(spec.numel for spec in CRADIO_V4_H.params()) == tower + projector
    assert CRADIO_V4_H.flops(100) == 32 * (2 * 12 * h**2 * 100 + 4 * h * 100**2)


@pytest.mark.parametrize("config", [CRADIO_V4_H, CRADIO_V4_H_TINY])
def test_presets(config: VisionConfig) -> None:
    assert list(config.problems()) == []
    assert from_yaml(VisionConfig, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads", "5 heads do not divide hidden_size = 32"),
        ({"start_token": 18}, "start_token", "18 is the placeholder"),
        ({"frames": 1}, "frames", "set at least 2, or 0"),
        ({"video_grid": 5}, "video_grid", "5 patches are not divided by merge = 2"),
        ({"min_patches": 99}, "min_patches", "between merge^2 = 4 and max_patches = 64"),
        ({"mean": (0.5,)}, "mean", "1 numbers for 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, "std", "more than 0"),
        ({"pruning": 1.0}, "pruning", "less than 1"),
    ],
)
def test_impossible(changes: dict[str, object], path: str, message: str) -> None:
    (problem,) = replace(CRADIO_V4_H_TINY, **changes).problems()
    assert problem.path == path
    assert message in problem.message
