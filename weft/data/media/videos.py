"""Videos: a list of pictures, an animated picture, or a film (which needs PyAV)."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from weft.data.media.blob import Blob, Fault
from weft.data.media.packages import av
from weft.data.media.pictures import colours, open_picture, picture
from weft.spec.data import MediaConfig

Frame = UInt8[np.ndarray, "height width 3"]


def form_of(blobs: Sequence[Blob], limits: MediaConfig) -> str:
    """``frames``, ``animation`` or ``film``, by its first bytes; several files are its frames.

    Raises:
        Fault: it cannot be read.
    """
    if len(blobs) != 1:
        return "frames"
    head = blobs[0].read(limits.max_bytes)[:12]
    picture = head.startswith((b"GIF8", b"\x89PNG")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")
    return "animation" if picture else "film"


def chosen(total: int, most: int) -> list[int]:
    """Which frames of a video are read: all, or ``most`` that are evenly spaced."""
    take = min(total, most)
    return [i * total // take for i in range(take)]


def count_frames(form: str, blobs: Sequence[Blob], limits: MediaConfig) -> int:
    """Frames of a video; a film is decoded for it.

    Raises:
        Fault: the video cannot be decoded.
        DataError: PyAV is missing.
    """
    if form == "frames":
        return len(blobs)
    if form == "animation":
        with open_picture(blobs[0].read(limits.max_bytes), limits.max_pixels) as image:
            return getattr(image, "n_frames", 1)
    return sum(1 for _ in _film(blobs[0], limits))


def read_frames(form: str, blobs: Sequence[Blob], wanted: list[int], limits: MediaConfig) -> Iterator[Frame]:
    """Some frames of a video, one at a time, by number in rising order.

    Raises:
        Fault: the video, or a frame of it, cannot be decoded.
        DataError: PyAV is missing.
    """
    if form == "frames":
        for number in wanted:
            yield picture(blobs[number].read(limits.max_bytes), limits.max_pixels)
    elif form == "animation":
        with open_picture(blobs[0].read(limits.max_bytes), limits.max_pixels) as image:
            for number in wanted:
                _seek(image, number)
                yield colours(image)
    else:
        asked = set(wanted)
        for number, frame in enumerate(_film(blobs[0], limits)):
            if number in asked:
                yield frame.to_ndarray(format="rgb24")
            if number >= wanted[-1]:
                return


def _seek(image: Image.Image, number: int) -> None:
    try:
        image.seek(number)
    except Exception as error:  # decoders raise what they like on damaged data
        raise Fault("broken video", f"frame {number + 1} cannot be decoded ({error})") from error


def _film(blob: Blob, limits: MediaConfig) -> Iterator:
    """Decoded frames of a film, as PyAV has them."""
    package = av(blob.path)
    try:
        with package.open(io.BytesIO(blob.read(limits.max_bytes))) as container:
            if not container.streams.video:
                raise Fault("broken video", "it has no pictures")
            for frame in container.decode(video=0):
                if frame.width * frame.height > limits.max_pixels:
                    shape = f"frames of {frame.width} x {frame.height} pixels"
                    fix = "shrink it or raise data.media.max_pixels"
                    raise Fault("too many pixels", f"{shape}; the limit is {limits.max_pixels:,}: {fix}")
                yield frame
    except (package.FFmpegError, ValueError) as error:
        raise Fault("broken video", f"cannot be decoded ({error})") from error
