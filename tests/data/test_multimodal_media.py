"""What encoders read: grids, patches and mel frames against other implementations, and bounded memory."""

import ast
import importlib.util
import math
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media_files import AUDIO, ENCODERS, VISION, chat, gif, image, index, picture, png, settings, wav, write
from PIL import Image

from weft.data.media.blob import Blob, whole
from weft.data.media.items import Media, measure
from weft.data.media.pictures import grid, patches
from weft.data.media.pictures import picture as decode_picture
from weft.data.media.sounds import decode, resample, resampled
from weft.data.mel import mel
from weft.spec.data import MediaConfig
from weft.spec.vision import VisionConfig, kept

LIMITS = MediaConfig()


def item(path, kind="picture", encoders=ENCODERS, limits=LIMITS):
    name = "audio" if kind == "sound" else "vision"
    return measure(name, encoders[name], kind, [whole(path)], f"{path}:1", limits)


@cache
def published_grid():
    """The function of transformers' image processor, whose module needs torchvision to be imported."""
    found = importlib.util.find_spec("transformers.models.nemotron_h_omni")
    path = Path(found.submodule_search_locations[0]) / "image_processing_nemotron_h_omni.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if getattr(n, "name", "") == "get_patch_grid_size"]
    scope = {"math": math}
    exec(compile(tree, str(path), "exec"), scope)
    return scope["get_patch_grid_size"]


SIDES = st.integers(1, 3000)
LARGE = VisionConfig(
    **{f: getattr(VISION, f) for f in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{f: getattr(VISION, f) for f in ("intermediate_size", "output_size", "projector_size", "token")},
)


@given(SIDES, SIDES, st.sampled_from([(4, 64), (16, 16), (1024, 13312), (256, 1000)]))
def test_grids_equal_those_of_transformers(height, width, limits):
    config = replace(LARGE, min_patches=limits[0], max_patches=limits[1])
    rows, cols = grid(height, width, config)
    assert rows % 2 == cols % 2 == 0
    assert rows * cols <= limits[1]
    try:
        want = published_grid()(height, width, 16, 2, *limits)
    except ZeroDivisionError:  # a side of no patches
        return
    if 0 < want[0] * want[1] <= limits[1]:
        assert (rows, cols) == want


@pytest.mark.parametrize("shape", [(40, 60), (100, 30), (16, 16), (5, 9)])
def test_patches_equal_antialiased_bicubic_resizing(shape):
    """The formula of transformers' processor: resize in floats, divide by 255, normalize, cut."""
    pixels = np.asarray(picture(*shape))
    rows, cols = grid(*shape, VISION)
    planes = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    size = (rows * VISION.patch, cols * VISION.patch)
    large = torch.nn.functional.interpolate(planes, size=size, mode="bicubic", antialias=True)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (VISION.mean, VISION.std))
    normal = (large / 255 - mean) / std
    cut = normal.reshape(3, rows, VISION.patch, cols, VISION.patch).permute(1, 3, 0, 2, 4)
    want = cut.reshape(rows * cols, -1)[torch.tensor(VISION.order(rows, cols))]
    np.testing.assert_allclose(patches([pixels], rows, cols, VISION), want, atol=2e-5)


def test_pictures_are_upright_on_white_and_in_colour(tmp_path):
    plain = picture(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = decode_picture(png(plain, exif=exif), 10_000)
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(plain), -1))
    clear = plain.convert("RGBA")
    clear.putalpha(0)
    assert (decode_picture(png(clear), 10_000) == 255).all()
    grey = decode_picture(png(plain.convert("L")), 10_000)
    assert grey.shape == (8, 12, 3)
    assert (grey == grey[:, :, :1]).all()
    deep = Image.fromarray(np.asarray(plain.convert("L"), np.uint16) * 257)
    np.testing.assert_array_equal(decode_picture(png(deep), 10_000), grey)
    assert decode_picture(png(plain, "JPEG"), 10_000).shape == (8, 12, 3)
    assert decode_picture(png(plain, "WEBP"), 10_000).shape == (8, 12, 3)
    photo = png(plain, "MPO", save_all=True, append_images=[plain])  # with a preview, as cameras write them
    assert decode_picture(photo, 10_000).shape == (8, 12, 3)


def test_one_channel_is_brightness():
    config = replace(VISION, channels=1, mean=(0.0,), std=(1.0,))
    white = np.full((16, 16, 3), 255, np.uint8)
    assert patches([white], 4, 4, config).tolist() == np.ones((16, 16)).tolist()


def test_pruning_keeps_fewer_rows(tmp_path):
    (tmp_path / "a.gif").write_bytes(gif(6))
    pruned = {"vision": replace(VISION, pruning=0.5)}
    found = item(tmp_path / "a.gif", "video", pruned)
    assert found.rows == kept(3, 4, 0.5) == 6


@pytest.mark.parametrize(
    ("width", "channels", "rate"), [(1, 1, 16000), (2, 2, 8000), (3, 1, 22050), (4, 1, 44100)]
)
def test_waves_of_every_width(tmp_path, width, channels, rate):
    data = wav(2000, rate, width, channels)
    samples, own = decode(data, 10.0)
    assert own == rate
    values = np.frombuffer(data[44:], np.uint8).reshape(2000, channels, width)
    if width == 1:
        want = values[:, :, 0] / 128 - 1.0
    else:
        want = [
            [int.from_bytes(v.tobytes(), "little", signed=True) / 2 ** (8 * width - 1) for v in row]
            for row in values
        ]
    np.testing.assert_allclose(samples, np.mean(want, 1), atol=1e-6)
    (tmp_path / "a.wav").write_bytes(data)
    found = item(tmp_path / "a.wav", "sound")
    made = Media(ENCODERS, LIMITS).load(found, 0)
    assert found.sizes == ((len(made),),)
    np.testing.assert_array_equal(made, mel(resample(samples, own, 16000), AUDIO))


@given(st.integers(0, 500), st.sampled_from([8000, 22050, 44100, 48000, 11025]))
def test_resampled_lengths(count, rate):
    made = resample(np.zeros(count, np.float32), rate, 16000)
    assert len(made) == resampled(count, rate, 16000) == math.ceil(count * 16000 / rate)


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_resampling_keeps_what_can_be_heard(rate):
    low, high = (
        np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32) for hertz in (440, 10000)
    )
    made = resample(low, rate, 16000)
    want = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(made - want)[200:-200].max() < 1e-3
    if rate > 20000:  # what 16 kHz cannot hold is gone
        assert np.abs(resample(high, rate, 16000))[200:-200].max() < 0.01


def test_pieces_and_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture(16, 24)))
    media, found = Media(ENCODERS, LIMITS), item(tmp_path / "a.png")
    assert found.sizes == ((1, 4, 6),)
    np.testing.assert_array_equal(media.piece(found, 0, 3, 9), media.load(found, 0)[3:9])
    np.testing.assert_array_equal(media.picture(found), np.asarray(picture(16, 24)))


def test_of_a_video_sequences_are_read_apart(tmp_path):
    (tmp_path / "a.gif").write_bytes(gif(24))
    found = item(tmp_path / "a.gif", "video")
    whole_video = [Media(ENCODERS, LIMITS).load(found, i) for i in range(12)]
    media = Media(ENCODERS, replace(LIMITS, cache_bytes=0))
    for i in (11, 3, 0, 7):
        np.testing.assert_array_equal(media.load(found, i), whole_video[i])


def test_what_is_kept_is_bounded_and_the_last_used(tmp_path, monkeypatch):
    found = []
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(picture(seed=i)))
        found.append(item(tmp_path / f"{i}.png"))
    size = Media(ENCODERS, LIMITS).load(found[0], 0).nbytes
    media, reads = Media(ENCODERS, replace(LIMITS, cache_bytes=2 * size)), []
    read = Blob.read
    monkeypatch.setattr(Blob, "read", lambda blob, most: reads.append(blob.path[-5]) or read(blob, most))
    for i in (0, 1, 0, 2, 0, 1):
        media.load(found[i], 0)
    assert "".join(reads) == "0121"


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_memory_is_bounded(tmp_path, kept_bytes):
    """Twenty-four pictures of 2 MB and as many clips, indexed and loaded, within the space of a few."""
    rows = []
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes(png(Image.new("RGB", (800, 800), (i, 2 * i, 3 * i))))
        (tmp_path / f"{i}.wav").write_bytes(wav(40_000, seed=i))
        rows.append(chat(image(f"{i}.png"), {"type": "audio", "audio": f"{i}.wav"}, "?"))
    config = settings(write(tmp_path, rows), seq_length=256, media=replace(LIMITS, cache_bytes=kept_bytes))
    index(settings(write(tmp_path, rows[:1])), tmp_path / "cache")  # modules, filters
    write(tmp_path, rows)
    tracemalloc.start()
    try:
        data = index(config, tmp_path / "cache")
        for document in range(24):
            for found in data.splits["train"].items(document):
                data.media.load(found.item, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20
