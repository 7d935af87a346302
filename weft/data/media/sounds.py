"""Sound: decoded to one channel of numbers between -1 and 1, and brought to another rate."""

import io
import math
import wave
from functools import lru_cache
from itertools import chain

import numpy as np
from jaxtyping import Float32

from weft.data.media.blob import Fault
from weft.data.media.packages import av

RATES = (1_000, 192_000)
"""Samples per second that can be read."""
_BLOCK = 4096  # samples made at a time
_LOBES = 16  # zero crossings of the filter on each side
_SCALE = {1: 2.0**7, 2: 2.0**15, 3: 2.0**31, 4: 2.0**31}  # by bytes of a sample; 3 bytes are widened to 4


def decode(data: bytes, most: float) -> tuple[Float32[np.ndarray, " samples"], int]:
    """The samples of a clip, its channels averaged, and how many are a second.

    Waves need nothing else; other formats need PyAV.

    Raises:
        Fault: it cannot be decoded, has no samples or some that are no numbers, or lasts longer than
            ``most`` seconds.
        DataError: PyAV is missing.
    """
    samples, rate = _read_wave(data, most) if data[:4] == b"RIFF" else _read_other(data, most)
    if not len(samples):
        raise Fault("empty clip", "it has no samples")
    if not RATES[0] <= rate <= RATES[1]:
        raise Fault("broken clip", f"{rate} samples per second; {RATES[0]} to {RATES[1]} can be read")
    if not np.isfinite(samples).all():
        raise Fault("broken clip", "it has samples that are not finite numbers")
    return samples, rate


def _read_wave(data: bytes, most: float) -> tuple[Float32[np.ndarray, " samples"], int]:
    try:
        with wave.open(io.BytesIO(data)) as sound:
            count, rate = sound.getnframes(), sound.getframerate()
            width, channels = sound.getsampwidth(), sound.getnchannels()
            _check_length(count / rate, most)
            raw = sound.readframes(count)
    except (wave.Error, EOFError, ZeroDivisionError, ValueError) as error:
        if "unknown format" in str(error):  # floating point, and formats that wrap others
            return _read_other(data, most)
        raise Fault("broken clip", f"no wave that can be read ({error})") from error
    if len(raw) != count * width * channels:
        have = len(raw) // (width * channels)
        raise Fault("broken clip", f"it is cut: its header names {count:,} samples, but {have:,} are there")
    return _floats(raw, width).reshape(-1, channels).mean(1, dtype=np.float32), rate


def _floats(raw: bytes, width: int) -> Float32[np.ndarray, " values"]:
    if width == 1:  # of all widths this one alone is unsigned
        whole = np.frombuffer(raw, np.uint8).astype(np.int64) - 128
    elif width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        whole = wide.view("<i4")[:, 0]
    else:
        whole = np.frombuffer(raw, f"<i{width}")
    return (whole / _SCALE[width]).astype(np.float32)


def _read_other(data: bytes, most: float) -> tuple[Float32[np.ndarray, " samples"], int]:
    package, parts, count = av("this clip"), list[np.ndarray](), 0
    try:
        with package.open(io.BytesIO(data)) as container:
            stream = container.streams.audio[0]
            form = package.AudioResampler(format="fltp", layout="mono", rate=stream.rate)
            for frame in chain(container.decode(stream), [None]):  # None: what is left inside
                for part in form.resample(frame):
                    parts.append(part.to_ndarray()[0])
                    count += len(parts[-1])
                    _check_length(count / stream.rate, most)
    except (package.FFmpegError, IndexError, ValueError) as error:
        raise Fault("broken clip", f"no sound that can be read ({error})") from error
    return np.concatenate([np.zeros(0, np.float32), *parts]), int(stream.rate)


def _check_length(seconds: float, most: float) -> None:
    if seconds > most:
        fix = "cut it or raise data.media.max_seconds"
        raise Fault("too long a clip", f"{seconds:.1f} seconds; the limit is {most:g}: {fix}")


def resampled(samples: int, own: int, rate: int) -> int:
    """How many samples a clip has at another rate."""
    return -(-samples * rate // own)


def resample(
    samples: Float32[np.ndarray, " samples"], own: int, rate: int
) -> Float32[np.ndarray, " resampled"]:
    """The same sound at another rate.

    A windowed sinc (Hann) that lets through what both rates can hold (Smith, Digital Audio Resampling).
    """
    if own == rate:
        return samples
    common = math.gcd(own, rate)
    filters = _filters(own // common, rate // common)
    phases, taps = filters.shape
    padded = np.pad(samples, (taps // 2, taps // 2 + 1))
    count = resampled(len(samples), own, rate)
    made = np.empty(count, np.float32)
    for first in range(0, count, _BLOCK):
        number = np.arange(first, min(first + _BLOCK, count))
        near = padded[(number * own // rate)[:, None] + np.arange(taps)]
        made[first : first + _BLOCK] = np.einsum("nt,nt->n", near, filters[number % phases])
    return made


@lru_cache(maxsize=8)
def _filters(down: int, up: int) -> Float32[np.ndarray, "phases taps"]:
    """Weights of the samples around one, for each place that a new sample may have between two old ones."""
    cut = min(1.0, up / down)
    reach = math.ceil(_LOBES / cut)
    phase = np.arange(up) * down % up / up
    away = phase[:, None] - np.arange(-reach, reach + 1)
    window = np.cos(np.pi / 2 * np.clip(away / (reach + 1), -1, 1)) ** 2
    return (cut * np.sinc(cut * away) * window).astype(np.float32)
