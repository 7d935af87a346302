"""What a model must beat: a token-unigram model and two compressors on the validation text."""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

_CHUNK = 1 << 20
_MOST = 64 << 20  # bytes beyond which the compressors (about 1 MB/s) are left out


def unigram_bits(train: Int64[np.ndarray, " vocab"], valid: Int64[np.ndarray, " vocab"]) -> float:
    """Bits the validation tokens cost under the training frequencies with add-one smoothing.

    Both count every predicted token, end tokens included, over the whole vocabulary.
    """
    chance: Float[np.ndarray, " vocab"] = (train + 1.0) / (train.sum() + len(train))
    return float(-(valid * np.log2(chance)).sum())


def compressed_bits(texts: Sequence[Path]) -> dict[str, int]:
    """Bits of the concatenated files under ``zlib`` level 9 and ``lzma`` preset 9 extreme; none if large."""
    if sum(path.stat().st_size for path in texts) > _MOST:
        return {}
    compressors = {"zlib": zlib.compressobj(9), "lzma": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)}
    sizes = dict.fromkeys(compressors, 0)
    for chunk in _chunks(texts):
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(chunk))
    return {name: 8 * (sizes[name] + len(compressor.flush())) for name, compressor in compressors.items()}


def _chunks(texts: Sequence[Path]) -> Iterator[bytes]:
    for path in texts:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
