"""Items: measured once without keeping pixels, then loaded sequence by sequence where an encoder is."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from weft.config.errors import DataError
from weft.data.media.blob import Blob, Fault
from weft.data.media.pictures import grid, patches, picture
from weft.data.media.sounds import decode, resample, resampled
from weft.data.media.videos import chosen, count_frames, form_of, read_frames
from weft.data.mel import mel
from weft.plan.items import Item, Size
from weft.spec.audio import AudioConfig
from weft.spec.data import MediaConfig
from weft.spec.encoder import EncoderConfig
from weft.spec.vision import VisionConfig, kept

Kind = Literal["picture", "video", "sound"]
READERS: dict[Kind, type[EncoderConfig]] = {
    "picture": VisionConfig,
    "video": VisionConfig,
    "sound": AudioConfig,
}
_AHEAD = 8  # groups of a video that are made when one is asked for


class Origin(NamedTuple):
    """What the ``ref`` of an item says.

    Attributes:
        form: picture, sound, or how a video lies (frames, animation, film).
        total: frames of the video, also those that are not read.
        place: where it is named.
        blobs: its bytes.
    """

    form: str
    total: int
    place: str
    blobs: tuple[Blob, ...]

    @property
    def ref(self) -> tuple[int | str | float, ...]:
        """As plain values."""
        return (self.form, self.total, self.place, *chain.from_iterable(self.blobs))

    @classmethod
    def of(cls, item: Item) -> "Origin":
        """Of an item."""
        form, total, place, *values = item.ref
        fields: list[Any] = list(values)
        width = len(Blob._fields)
        blobs = tuple(Blob(*fields[i : i + width]) for i in range(0, len(fields), width))
        return cls(str(form), int(total), str(place), blobs)


def measure(
    name: str, encoder: EncoderConfig, kind: Kind, blobs: Sequence[Blob], place: str, limits: MediaConfig
) -> Item:
    """An item and its sizes. It is decoded, one frame at a time, so that damage is known; nothing is kept.

    Args:
        name: of the encoder.
        encoder: its settings.
        kind: what it is.
        blobs: where it lies; a video has several if its frames lie apart.
        place: where it is named, for messages.
        limits: on what is decoded.

    Raises:
        Fault: it cannot be used.
        DataError: a package is missing.
    """
    form, total = str(kind), 0
    if isinstance(encoder, AudioConfig):
        samples, own = decode(blobs[0].read(limits.max_bytes), limits.max_seconds)
        frames = encoder.mel_frames(resampled(len(samples), own, encoder.sample_rate))
        sizes: tuple[Size, ...] = ((frames,),)
        rows = encoder.outputs(sizes[0])
    elif isinstance(encoder, VisionConfig) and kind == "picture":
        height, width, _ = picture(blobs[0].read(limits.max_bytes), limits.max_pixels).shape
        sizes = ((1, *grid(height, width, encoder)),)
        rows = encoder.outputs(sizes[0])
    elif isinstance(encoder, VisionConfig):
        form, total, sizes = _measure_video(name, encoder, blobs, limits)
        rows = kept(len(sizes), encoder.outputs(sizes[0]), encoder.pruning)
    else:
        raise TypeError(f"{type(encoder).__name__} reads no {kind}")
    return Item(name, sizes, rows, Origin(form, total, place, tuple(blobs)).ref)


def _measure_video(
    name: str, encoder: VisionConfig, blobs: Sequence[Blob], limits: MediaConfig
) -> tuple[str, int, tuple[Size, ...]]:
    if not encoder.frames:
        raise Fault("no encoder", f"encoders.{name} reads no video; set its frames to 2 or more")
    if not blobs:
        raise Fault("empty video", "it has no frames")
    form = form_of(blobs, limits)
    total = count_frames(form, blobs, limits)
    if not total:
        raise Fault("empty video", "it has no frames")
    wanted = chosen(total, limits.max_frames)
    seen = sum(1 for _ in read_frames(form, blobs, wanted, limits))
    if seen < len(wanted):
        raise Fault("broken video", f"{seen} of {len(wanted)} frames can be decoded")
    groups = -(-len(wanted) // encoder.frames)
    return form, total, ((encoder.frames, encoder.video_grid, encoder.video_grid),) * groups


class Media:
    """What encoders read of items; keeps what was used last.

    An item is decoded when one of its sequences is asked for, on the rank that asks.

    Args:
        encoders: by name.
        limits: on what is decoded and kept.
    """

    def __init__(self, encoders: Mapping[str, EncoderConfig], limits: MediaConfig) -> None:
        self.encoders, self.limits = encoders, limits
        self._kept: OrderedDict[tuple[Item, int], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def load(self, item: Item, sequence: int) -> Float32[np.ndarray, "rows width"]:
        """All of a sequence.

        Of a picture or a group of frames its normalized patches [rows * columns, frames * channels *
        patch^2], in block order; of sound its mel frames [frames, mels].

        Raises:
            DataError: it is not what it was when the data was indexed; names file and line.
        """
        with self._lock:
            found = self._kept.get((item, sequence))
            if found is not None:
                self._kept.move_to_end((item, sequence))
                return found
        for number, made in self._guarded(item, lambda: self._made(item, sequence)):
            self._keep((item, number), made)
            found = made if number == sequence else found
        if found is None:
            place = Origin.of(item).place
            raise DataError(f"{place}: ends before sequence {sequence}, which was there before")
        return found

    def piece(self, item: Item, sequence: int, first: int, last: int) -> Float32[np.ndarray, "some width"]:
        """Patches, or mel frames, ``first`` to ``last`` of a sequence."""
        return self.load(item, sequence)[first:last]

    def picture(self, item: Item) -> UInt8[np.ndarray, "height width 3"]:
        """A picture, or the first frame of a video, as it is; to be shown.

        Raises:
            DataError: see ``load``; also for sound.
        """
        origin = Origin.of(item)
        if origin.form == "sound":
            raise DataError(f"{origin.place}: sound has no picture")
        form = "frames" if origin.form == "picture" else origin.form
        made = self._guarded(item, lambda: enumerate(read_frames(form, origin.blobs, [0], self.limits)))
        return next(made)[1]

    def _guarded(
        self, item: Item, make: Callable[[], Iterator[tuple[int, Any]]]
    ) -> Iterator[tuple[int, Any]]:
        try:
            yield from make()
        except Fault as fault:
            fix = "it was in order when the data was indexed: restore it"
            raise DataError(f"{Origin.of(item).place}: {fault.reason}: {fault}; {fix}") from fault

    def _made(self, item: Item, sequence: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number, content) of a sequence, and of a video of some that follow it."""
        encoder, limits, origin = self.encoders[item.encoder], self.limits, Origin.of(item)
        if isinstance(encoder, VisionConfig) and origin.form != "picture":
            yield from self._groups(item, sequence, encoder)
            return
        data = origin.blobs[0].read(limits.max_bytes)
        if isinstance(encoder, AudioConfig):
            made = mel(resample(*decode(data, limits.max_seconds), encoder.sample_rate), encoder)
            size: Size = (len(made),)
        elif isinstance(encoder, VisionConfig):
            pixels = picture(data, limits.max_pixels)
            rows, cols = grid(pixels.shape[0], pixels.shape[1], encoder)
            made, size = patches([pixels], rows, cols, encoder), (1, rows, cols)
        else:
            raise TypeError(f"{type(encoder).__name__} reads no items")
        if size != item.sizes[sequence]:
            raise Fault("changed file", f"of size {size}, but {item.sizes[sequence]} before")
        yield sequence, made

    def _groups(self, item: Item, first: int, encoder: VisionConfig) -> Iterator[tuple[int, np.ndarray]]:
        count, origin = encoder.frames, Origin.of(item)
        numbers = chosen(origin.total, self.limits.max_frames)
        last = min(len(item.sizes), first + _AHEAD)
        stream = read_frames(origin.form, origin.blobs, numbers[first * count : last * count], self.limits)
        for group in range(first, last):
            some = list(islice(stream, count))
            if not some:
                return
            some += some[-1:] * (count - len(some))  # the last frame again
            _, rows, cols = item.sizes[group]
            yield group, patches(some, rows, cols, encoder)

    def _keep(self, key: tuple[Item, int], made: np.ndarray) -> None:
        if made.nbytes > self.limits.cache_bytes:
            return
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += made.nbytes
            while self._bytes > self.limits.cache_bytes:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
