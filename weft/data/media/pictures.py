"""Pictures: decoded with limits, sized to a grid of patches, cut into patches.

Resizing is Pillow's bicubic filter on unrounded numbers, so that values may leave the range of bytes.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from weft.data.media.blob import Fault
from weft.spec.vision import VisionConfig

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is opened; other decoders of Pillow are never tried (some of them start programs)."""
_DEEP = 257  # 16-bit values per 8-bit value


def open_picture(data: bytes, most: int) -> Image.Image:
    """A picture whose header was read.

    Raises:
        Fault: it is no picture, or it or its frames have no pixels or more than ``most``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Fault("too many pixels", f"{error}; leave the picture out") from error
    except Exception as error:
        known = ", ".join(FORMATS)
        raise Fault("broken picture", f"no picture that can be read ({error}); known are {known}") from error
    pixels = image.width * image.height
    if not 0 < pixels <= most:
        shape = f"{image.width} x {image.height} pixels"
        fix = f"the limit is {most:,}: shrink it or raise data.media.max_pixels"
        raise Fault("too many pixels" if pixels else "empty picture", f"{shape}; {fix}")
    return image


def picture(data: bytes, most: int) -> UInt8[np.ndarray, "height width 3"]:
    """A picture as red, green and blue, upright, on white where it is transparent.

    Raises:
        Fault: see ``open_picture``; also for a damaged or an animated picture.
    """
    with open_picture(data, most) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # cameras add previews in that form
            raise Fault("animated picture", "it has several frames; give it as a video")
        return colours(image)


def colours(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """The frame of a picture that is at hand.

    Raises:
        Fault: it is damaged.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            deep = np.minimum(np.asarray(image, np.int64) // _DEEP, 255)
            image = Image.fromarray(deep.astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise what they like on damaged data
        raise Fault("broken picture", f"cannot be decoded ({error})") from error


def grid(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
    """Rows and columns of patches for a picture of so many pixels.

    Close to the picture's own; between ``min_patches`` and ``max_patches`` with its proportions kept; both
    multiples of ``merge``. Where one side is very short the proportions give way.
    """
    side, most, least = config.merge, config.max_patches, config.min_patches
    rows, cols = (round(n / config.patch + 0.5) for n in (height, width))
    factor = min(math.sqrt(most / (rows * cols)), 1.0)
    rows, cols = max(1, math.floor(factor * rows)), max(1, math.floor(factor * cols))
    if least < most and rows * cols < least:
        factor = math.sqrt(least / (rows * cols))
        rows, cols = math.ceil(factor * rows), math.ceil(factor * cols)
    rows = _multiple(rows, cols, side, most)
    cols = _multiple(cols, rows, side, most)
    if rows * cols > most:
        rows, cols = (min(n, max(side, most // m // side * side)) for n, m in ((rows, cols), (cols, rows)))
    return rows, cols


def _multiple(count: int, other: int, side: int, most: int) -> int:
    """The next multiple of ``side``, or the one before where the picture would be too large."""
    up = -(-count // side) * side
    return up if up * other <= most else max(side, count // side * side)


def patches(
    frames: Sequence[UInt8[np.ndarray, "height width 3"]], rows: int, cols: int, config: VisionConfig
) -> Float32[np.ndarray, "patches pixels"]:
    """Normalized patches of one or several frames, in block order.

    A patch is ``[frames, channels, patch, patch]`` numbers.
    """
    high, wide, side = rows * config.patch, cols * config.patch, config.patch
    planes = [_resized(plane, high, wide) for frame in frames for plane in _planes(frame, config.channels)]
    mean, std = (np.tile(np.asarray(v, np.float32), len(frames)) for v in (config.mean, config.std))
    numbers = (np.stack(planes) / np.float32(255) - mean[:, None, None]) / std[:, None, None]
    cut = numbers.reshape(len(planes), rows, side, cols, side).transpose(1, 3, 0, 2, 4)
    return cut.reshape(rows * cols, -1)[config.order(rows, cols)]


def _planes(frame: UInt8[np.ndarray, "height width 3"], channels: int) -> list[np.ndarray]:
    """The channels of a frame as floats: three colours, or their brightness."""
    if channels == 1:
        return [np.asarray(Image.fromarray(frame).convert("L"), np.float32)]
    return [np.asarray(frame[:, :, c], np.float32) for c in range(3)]


def _resized(plane: np.ndarray, high: int, wide: int) -> Float32[np.ndarray, "high wide"]:
    if plane.shape == (high, wide):
        return plane
    return np.asarray(Image.fromarray(plane).resize((wide, high), Image.Resampling.BICUBIC))
