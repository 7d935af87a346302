"""Experts of limited capacity: the groups of tokens that they are offered, and what orders their choice.

An expert takes of a group of L tokens ``ceil(factor * L * top_k / experts)`` pairs (token, slot), at least 1
(Switch Transformer, arXiv 2101.03961, eq. 3, with top_k choices). A group is a run of tokens of one sample,
so that what is dropped is the same under every layout.
"""

from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Groups(NamedTuple):
    """The groups of a run of tokens as one rank sees them.

    Attributes:
        lengths: tokens of each group.
        here: tokens of each group that are here.
        shared: lengths of the groups that other ranks may have tokens of, too.
        pieces: for each run of tokens here inside shared groups, its first token among the tokens here, its
            first token among those of all shared groups, and its length.
    """

    lengths: tuple[int, ...]
    here: tuple[int, ...]
    shared: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=64)
def group(
    windows: tuple[int, ...], tokens: int, own: range, parts: tuple[range, ...] | None = None
) -> Groups:
    """Groups of ``tokens`` tokens (0: all) of each window; the last of a window may have fewer.

    Args:
        windows: tokens of each sample of the run.
        tokens: of a group.
        own: tokens of the run that are here.
        parts: tokens of the run on each rank that has some; None where that is not known.
    """
    lengths = tuple(
        min(step, n - at) for n in windows if n for step in (tokens or n,) for at in range(0, n, step)
    )
    edges = None if parts is None else {part.start for part in parts if part}
    here, shared, pieces, at = list[int](), list[int](), list[tuple[int, int, int]](), 0
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        first, last = max(start, own.start), min(stop, own.stop)
        here.append(max(0, last - first))
        if edges is not None and not any(start < edge < stop for edge in edges):
            continue
        if first < last:
            _extend(pieces, (first - own.start, at + first - start, last - first))
        shared.append(stop - start)
        at += stop - start
    return Groups(lengths, tuple(here), tuple(shared), tuple(pieces))


def _extend(pieces: list[tuple[int, int, int]], piece: tuple[int, int, int]) -> None:
    """Add a piece, to the last one if it follows it here and there."""
    if pieces and all(pieces[-1][i] + pieces[-1][2] == piece[i] for i in (0, 1)):
        piece = (*pieces[-1][:2], pieces.pop()[2] + piece[2])
    pieces.append(piece)


@lru_cache(maxsize=1024)
def capacity(tokens: int, factor: float, top_k: int, experts: int) -> int:
    """Pairs that an expert takes of a group; ``factor`` is the decimal number that it is written as."""
    return max(1, ceil(Fraction(str(factor)) * tokens * top_k / experts))


def importance(weights: Float[Tensor, "tokens slots"]) -> Int64[Tensor, "tokens slots"]:
    """Routing weights as whole numbers of 24 bits in the same order.

    They keep 16 bits of the fraction: weights of tokens that are alike differ by the rounding errors of their
    layout, and must be equal here, so that the order of tokens decides.
    """
    return (weights.detach().abs().float().view(torch.int32).long() + 128) >> 8


def pack(
    ranking: Int64[Tensor, "tokens slots"], experts: Int64[Tensor, "tokens slots"]
) -> Int64[Tensor, "tokens slots"]:
    """Both as one number, 0 where there is no pair: ranks put theirs together by a sum."""
    return (ranking << 32) + experts + 1


def unpack(
    packed: Int64[Tensor, "tokens slots"],
) -> tuple[Int64[Tensor, "tokens slots"], Int64[Tensor, "tokens slots"]]:
    """Ranking and experts."""
    return packed >> 32, (packed & (1 << 32) - 1) - 1
