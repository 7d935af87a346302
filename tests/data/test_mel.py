"""Log-mel features: frame by frame as written in a textbook, and silence, short clips, bad samples."""

import math

import numpy as np
import pytest

from weft.config.errors import DataError
from weft.data import mel as module
from weft.data.mel import mel, mel_filters
from weft.models.presets import PARAKEET_OMNI
from weft.spec.audio import AudioConfig


def textbook(samples: np.ndarray, config: AudioConfig) -> np.ndarray:
    """One frame at a time, by the sum that defines the Fourier transform."""
    x = samples.astype(np.float64)
    x = np.concatenate([x[:1], x[1:] - config.preemphasis * x[:-1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.window) / (config.window - 1))
    first = (config.fft - config.window) // 2 - config.fft // 2
    times, bins = np.arange(config.window), np.arange(config.fft // 2 + 1)
    wave = np.exp(-2j * np.pi * np.outer(times, bins) / config.fft)
    bank = mel_filters(config.mels, config.fft, config.sample_rate)
    rows = []
    for frame in range(len(samples) // config.hop):
        at = frame * config.hop + first + times
        inside = (at >= 0) & (at < len(x))
        seen = np.where(inside, x[np.clip(at, 0, len(x) - 1)], 0.0)
        rows.append(np.log(np.abs((seen * window) @ wave) ** 2 @ bank + 2.0**-24))
    logs = np.stack(rows)
    return (logs - logs.mean(0)) / (logs.std(0, ddof=1) + 1e-5)


@pytest.mark.parametrize("samples", [1600, 4321, 16000])
def test_textbook(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    sound = np.random.default_rng(samples).normal(size=samples).astype(np.float32) / 8
    found = mel(sound, PARAKEET_OMNI)
    assert found.shape == (PARAKEET_OMNI.mel_frames(samples), 128) == (1 + samples // 160, 128)
    np.testing.assert_allclose(found[:-1], textbook(sound, PARAKEET_OMNI), atol=2e-5)
    assert not found[-1].any()


def test_filters_are_triangles_of_unit_area() -> None:
    bank = mel_filters(40, 4096, 16000)
    np.testing.assert_allclose(bank.sum(0) * 16000 / 4096, 1.0, rtol=0.02)
    centres = bank.argmax(0) * 16000 / 4096
    below = centres[centres < 900]
    np.testing.assert_allclose(np.diff(below), np.diff(below).mean(), atol=8)  # even, below 1 kHz
    above = centres[centres > 1100]
    ratios = above[1:] / above[:-1]
    np.testing.assert_allclose(ratios, ratios.mean(), rtol=0.02)  # and a constant ratio above


def test_a_tone_is_where_it_should_be() -> None:
    time = np.arange(16000) / 16000
    loud = np.where(time < 0.5, 0.0, np.sin(2 * math.pi * 3000 * time)).astype(np.float32)
    features = mel(loud, PARAKEET_OMNI)
    bank = mel_filters(128, 512, 16000)
    tone = bank[3000 * 512 // 16000].argmax()
    assert features[75:95, tone].mean() - features[:45, tone].mean() > 1.5


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 161, 319, 320])
def test_short_and_silent_clips_are_finite(samples: int) -> None:
    found = mel(np.zeros(samples, np.float32), PARAKEET_OMNI)
    assert found.shape == (1 + samples // 160, 128)
    assert not found.any()


def test_bad_samples_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        mel(np.array([0.0, np.nan], np.float32), PARAKEET_OMNI)
