"""How documents are cut into chunks, and chunks gathered into blocks: no chunk spans two documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from weft.ops.segments import Segments


@dataclass(frozen=True)
class Block:
    """Chunks worked on together: all of some neighbouring segments, or some of one segment.

    Attributes:
        segments: which segments.
        chunks: chunks of each of them in this block.
        size: tokens per chunk.
        tokens: which tokens.
        place: where each token lies among ``segments * chunks * size`` padded places; None without padding.
    """

    segments: slice
    chunks: int
    size: int
    tokens: slice
    place: Tensor | None

    def cut(self, own: Tensor, dtype: torch.dtype) -> Tensor:
        """The block's ``[tokens, ...]`` to ``[segments * chunks, size, ...]``; padding is zero."""
        own = own.to(dtype)
        if self.place is not None:
            places = (self.segments.stop - self.segments.start) * self.chunks * self.size
            own = own.new_zeros(places, *own.shape[1:]).index_copy_(0, self.place, own)
        return own.unflatten(0, (-1, self.size))

    def join(self, t: Tensor, out: Tensor) -> None:
        """Write ``[segments * chunks, size, ...]`` to its tokens of ``out``."""
        if self.place is None:
            out[self.tokens].view(t.shape).copy_(t)
        else:
            own = t.flatten(0, 1).index_select(0, self.place)
            out[self.tokens].view(own.shape).copy_(own)

    def by_chunk(self, t: Tensor, groups: int) -> Tensor:
        """``[segments * chunks * groups, ...]`` as ``[segments, chunks, groups, ...]``."""
        return t.unflatten(0, (-1, self.chunks, groups))


def make_blocks(segments: Segments, chunk: int, tokens: int, device: torch.device) -> list[Block]:
    """Cut ``segments`` into blocks of about ``tokens`` tokens, in order.

    Chunks are no longer than the longest segment; only the last one of a segment is ever padded.
    """
    size = max(1, min(chunk, max(segments.lengths, default=1)))
    most = max(1, tokens // size)
    blocks: list[Block] = []
    first = start = 0
    for count, alike in groupby(segments.lengths, key=lambda length: -(-length // size)):
        lengths = list(alike)
        if count > most:
            for length in lengths:
                blocks += _split(first, start, length, size, most, device)
                first, start = first + 1, start + length
            continue
        step = most // max(count, 1)
        for at in range(0, len(lengths), step):
            own = lengths[at : at + step]
            if count:
                blocks.append(_whole(first, start, own, count, size, device))
            first, start = first + len(own), start + sum(own)
    return blocks


def _whole(first: int, start: int, lengths: list[int], chunks: int, size: int, device: torch.device) -> Block:
    """Whole segments of ``chunks`` chunks each."""
    place = None
    if any(length % size for length in lengths):
        rows = [torch.arange(length) + s * chunks * size for s, length in enumerate(lengths)]
        place = torch.cat(rows).to(device, non_blocking=True)
    owned = slice(first, first + len(lengths))
    return Block(owned, chunks, size, slice(start, start + sum(lengths)), place)


def _split(
    segment: int, start: int, length: int, size: int, most: int, device: torch.device
) -> Iterator[Block]:
    """Parts of one long segment, ``most`` chunks at a time."""
    step = most * size
    for at in range(0, length, step):
        own = min(step, length - at)
        chunks, uneven = -(-own // size), own % size
        place = torch.arange(own).to(device, non_blocking=True) if uneven else None
        tokens = slice(start + at, start + at + own)
        yield Block(slice(segment, segment + 1), chunks, size, tokens, place)
