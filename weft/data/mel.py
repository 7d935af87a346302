"""Log-mel features of sound, as speech encoders read them (numpy only).

Pre-emphasis, windowed Fourier transform, Slaney's mel filters, logarithm, and each mel normalized over the
clip. The scale is linear below 1 kHz and logarithmic above (Slaney, Auditory Toolbox, 1998); a filter's area
is constant.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Float32, Float64

from weft.config.errors import DataError
from weft.spec.audio import AudioConfig

FLOOR = 2.0**-24  # added to energies before the logarithm
STD_FLOOR = 1e-5
BLOCK = 4096  # frames whose spectra exist at a time
LINEAR_HZ = 200 / 3  # of one mel below the break
BREAK_HZ, BREAK_MEL = 1000.0, 15.0
LOG_STEP = np.log(6.4) / 27.0  # of one mel above the break


def mel(samples: Float32[np.ndarray, " samples"], config: AudioConfig) -> Float32[np.ndarray, "frames mels"]:
    """Features of one clip: ``config.mel_frames(len(samples))`` rows.

    Each mel has mean 0 and variance 1 over the frames before the last, which only closes the clip and is 0.

    Args:
        samples: mono sound at ``config.sample_rate``, between -1 and 1.
        config: of the encoder.

    Raises:
        DataError: a sample is not a finite number.
    """
    if not np.isfinite(samples).all():
        raise DataError("sound has samples that are not finite numbers; decode the clip again")
    wide = samples.astype(np.float64)
    wide[1:] -= config.preemphasis * samples[:-1]
    heard = config.mel_frames(len(samples)) - 1
    logs = np.concatenate([np.zeros((0, config.mels)), *_blocks(wide, heard, config)])
    mean = logs.sum(0) / max(heard, 1)
    std = np.sqrt(np.square(logs - mean).sum(0) / max(heard - 1, 1))
    return np.concatenate([(logs - mean) / (std + STD_FLOOR), np.zeros((1, config.mels))]).astype(np.float32)


def _blocks(
    samples: Float64[np.ndarray, " samples"], frames: int, config: AudioConfig
) -> Iterator[Float64[np.ndarray, "some mels"]]:
    """Logarithms of mel energies; frame ``i`` is centred on sample ``i * hop``."""
    half = config.fft // 2
    padded = np.pad(samples, half)
    spans = np.lib.stride_tricks.sliding_window_view(padded, config.fft)[:: config.hop]
    shape, bank = _window(config.window, config.fft), mel_filters(config.mels, config.fft, config.sample_rate)
    for first in range(0, frames, BLOCK):
        spectrum = np.fft.rfft(spans[first : min(first + BLOCK, frames)] * shape)
        yield np.log(np.square(np.abs(spectrum)) @ bank + FLOOR)


@lru_cache
def _window(window: int, fft: int) -> Float64[np.ndarray, " fft"]:
    """Hann's window, symmetric, in the middle of a transform."""
    before = (fft - window) // 2
    return np.pad(np.hanning(window), (before, fft - window - before))


def _hertz(mels: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    above = BREAK_HZ * np.exp(LOG_STEP * (mels - BREAK_MEL))
    return np.where(mels < BREAK_MEL, LINEAR_HZ * mels, above)


@lru_cache
def mel_filters(mels: int, fft: int, sample_rate: int) -> Float64[np.ndarray, "bins mels"]:
    """Triangles of unit area (in Hz), their corners evenly spaced in mels up to half the rate."""
    top = BREAK_MEL + np.log(sample_rate / 2 / BREAK_HZ) / LOG_STEP
    if sample_rate / 2 < BREAK_HZ:
        top = sample_rate / 2 / LINEAR_HZ
    edges = _hertz(np.linspace(0.0, top, mels + 2))
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    bins = np.linspace(0.0, sample_rate / 2, fft // 2 + 1)[:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    triangles: Float[np.ndarray, "bins mels"] = np.maximum(0.0, np.minimum(rising, falling))
    return triangles * 2.0 / (high - low)
