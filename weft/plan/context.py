"""Bytes that the forms of context parallelism move, and which form is chosen.

All forms give the same numbers. Their bytes are those that a rank receives from others in one layer, forward
and backward, exactly as ``weft.parallel`` moves them. Sums over ranks travel in at least fp32.

Attention:

    all_gather    queries go to the balanced order and outputs come back; each rank gets all keys and values
                  that its queries see, from where they lie. Backward: the same the other way, keys and values
                  once more, and their gradients home, where they are summed (a reduce-scatter).
    ring          queries, keys and values go to the balanced order and outputs come back; then each rank gets
                  the keys and values that its queries see from one other rank after another. Backward as
                  above. It moves more than the all-gather, but holds the keys of one rank at a time.
    all_to_all    all tokens of some heads, with the keys and values that these need, and the way back.

Mamba-2 (the convolution and the scan):

    states        an all-gather of what each rank leaves behind: decays, final state, last inputs of the
                  convolution, and its first inputs with their time steps. Backward: a reduce-scatter.
    all_to_all    all tokens of some heads, with the groups that these need, and the way back.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from weft.plan.runs import Holding, arranged, contiguous, count, rows, seen

GATHERED = 2**32  # bytes of keys, values and their gradients that the all-gather may hold


class Traffic(NamedTuple):
    """Bytes that one rank receives from others, in one layer."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both ways."""
        return self.forward + self.backward


NOTHING = Traffic(0, 0)


@dataclass(frozen=True)
class AttendShape:
    """An attention layer over a pack of documents that ranks share.

    Attributes:
        lengths: tokens of the documents.
        counts: tokens of each rank.
        heads: query heads here (tensor parallelism has cut them already).
        kv_heads: key and value heads here.
        head_dim: numbers of one head.
        itemsize: bytes of a number.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2

    @property
    def head(self) -> int:
        """Bytes of one head of one token."""
        return self.head_dim * self.itemsize

    @property
    def summed(self) -> int:
        """The same of a sum over ranks."""
        return self.head_dim * max(4, self.itemsize)


@dataclass(frozen=True)
class ScanShape:
    """A Mamba-2 layer over a pack of documents that ranks share; heads and groups are those here.

    Attributes:
        lengths: tokens of the documents.
        counts: tokens of each rank.
        heads: heads.
        head_dim: numbers of one head.
        groups: groups of heads with common directions.
        state: numbers of one direction.
        taps: of the convolution; 1 where there is none.
        itemsize: bytes of an activation.
        step_itemsize: bytes of a time step.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    itemsize: int = 2
    step_itemsize: int = 4


@dataclass(frozen=True)
class Choice:
    """A form, and why.

    Attributes:
        form: what is chosen.
        bytes: of each possible form: what all ranks together receive in a layer, forward and backward.
        refused: the reason for each form that is not possible.
    """

    form: str
    bytes: Mapping[str, int]
    refused: Mapping[str, str]


def even(tokens: int, ranks: int) -> tuple[int, ...]:
    """Tokens of each rank, the first ones having what is over."""
    return tuple(tokens // ranks + (rank < tokens % ranks) for rank in range(ranks))


def crosses(lengths: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether a document has tokens on two ranks where each has so many, in order."""
    starts = set(accumulate(lengths, initial=0))
    return any(end not in starts for end in accumulate(counts))


def _balanced(shape: AttendShape, holders: Sequence[Holding], query: int, routed: int) -> list[Traffic]:
    """Where queries go to the balanced order and see what the ``holders`` of keys send.

    ``routed``: bytes of a token on the way there; ``query``: of its output on the way back.
    """
    here, there = contiguous(shape.counts), arranged(shape.lengths, shape.counts)
    sees = [seen(shape.lengths, own) for own in there]
    begun, ended = _rising(r.start for own in sees for r in own), _rising(r.stop for own in sees for r in own)
    out: list[Traffic] = []
    for rank, held in enumerate(holders):
        stays, own = count(rows(here[rank], there[rank])), count(rows(held, sees[rank]))
        come, back = count(there[rank]) - stays, shape.counts[rank] - stays
        sent = sum(begun(r.stop) - begun(r.start) - ended(r.stop) + ended(r.start) for r in held) - own
        keys = (count(sees[rank]) - own) * 2 * shape.kv_heads * shape.head
        sums = sent * 2 * shape.kv_heads * shape.summed
        out.append(Traffic(come * routed + keys + back * query, come * query + keys + sums + back * routed))
    return out


def _rising(points: Iterable[int]) -> Callable[[int], int]:
    """The sum over all points of how far a token lies beyond them."""
    ordered = sorted(points)
    below = list(accumulate(ordered, initial=0))

    def beyond(token: int) -> int:
        passed = bisect_left(ordered, token)
        return passed * token - below[passed]

    return beyond


def _ring(shape: AttendShape) -> list[Traffic]:
    query = shape.heads * shape.head
    there = arranged(shape.lengths, shape.counts)
    return _balanced(shape, there, query, query + 2 * shape.kv_heads * shape.head)


def _all_gather(shape: AttendShape) -> list[Traffic]:
    query = shape.heads * shape.head
    return _balanced(shape, contiguous(shape.counts), query, query)


def _all_to_all(shape: AttendShape) -> list[Traffic]:
    ranks, tokens = len(shape.counts), sum(shape.counts)
    q = shape.heads // ranks * shape.head
    kv = 2 * max(1, shape.kv_heads // ranks) * shape.head
    return [
        Traffic(
            (tokens - own) * (q + kv) + own * (ranks - 1) * q,
            (tokens - own) * q + own * (ranks - 1) * (q + kv),
        )
        for own in shape.counts
    ]


_ATTEND: dict[str, Callable[[AttendShape], list[Traffic]]] = {
    "all_gather": _all_gather,
    "ring": _ring,
    "all_to_all": _all_to_all,
}
ATTEND_FORMS = tuple(_ATTEND)


def attend_refusal(form: str, heads: int, kv_heads: int, ranks: int) -> str:
    """Why attention cannot take this form; empty where it can."""
    return _refusal("attend", form, heads, (kv_heads, "kv heads"), ranks, "ring or all_gather")


def scan_refusal(form: str, heads: int, groups: int, ranks: int) -> str:
    """Why a scan cannot take this form; empty where it can."""
    return _refusal("scan", form, heads, (groups, "groups"), ranks, "states")


def _refusal(slot: str, form: str, heads: int, shared: tuple[int, str], ranks: int, others: str) -> str:
    """All heads of some tokens for all tokens of some heads: heads and what they share must be dealt out."""
    count, name = shared
    if form != "all_to_all":
        return ""
    if heads % ranks:
        return (
            f"{slot}: all_to_all gives each of {ranks} cp ranks as many heads, but there are {heads}; "
            f"choose a cp that divides {heads}, or {others}"
        )
    if count % ranks and ranks % count:
        return (
            f"{slot}: all_to_all needs cp {ranks} and {count} {name} of which one divides the other; "
            f"choose such a cp, or {others}"
        )
    return ""


def attend_traffic(form: str, shape: AttendShape) -> tuple[Traffic, ...]:
    """Bytes of each rank; nothing moves where no document has tokens on two ranks.

    Raises:
        ValueError: the form is not possible (a fault of the caller).
    """
    refusal = attend_refusal(form, shape.heads, shape.kv_heads, len(shape.counts))
    if refusal:
        raise ValueError(refusal)
    if not crosses(shape.lengths, shape.counts):
        return (NOTHING,) * len(shape.counts)
    return tuple(_ATTEND[form](shape))


def gathered(shape: AttendShape) -> int:
    """Bytes of keys, values and their gradients that a rank holds at once in the all-gather, at most."""
    there = arranged(shape.lengths, shape.counts)
    tokens = max(count(seen(shape.lengths, own)) for own in there)
    return tokens * 2 * shape.kv_heads * (shape.head + shape.summed)


@lru_cache(maxsize=64)
def choose_attend(shape: AttendShape, limit: int = GATHERED) -> Choice:
    """The possible form that moves the fewest bytes, forward and backward, over all ranks.

    The all-gather holds all keys and values that are seen at once; it is not chosen where these and their
    gradients take more than ``limit`` bytes on a rank, and the ring takes its place. Of equal forms the one
    with fewer collectives is chosen: all_gather, ring, all_to_all.
    """
    refused = {form: attend_refusal(form, shape.heads, shape.kv_heads, len(shape.counts)) for form in _ATTEND}
    if gathered(shape) > limit:
        refused["all_gather"] = (
            f"attend: all_gather holds {gathered(shape)} bytes of keys, values and gradients, "
            f"more than the limit of {limit}; choose ring"
        )
    return _fewest({form: attend_traffic(form, shape) for form in _ATTEND if not refused[form]}, refused)


def _fewest(traffic: Mapping[str, Sequence[Traffic]], refused: Mapping[str, str]) -> Choice:
    total = {form: sum(rank.total for rank in ranks) for form, ranks in traffic.items()}
    form = min(total, key=lambda name: total[name])
    return Choice(form, total, {name: reason for name, reason in refused.items() if reason})


def _states(shape: ScanShape) -> list[Traffic]:
    channels = shape.heads * shape.head_dim + 2 * shape.groups * shape.state
    left = shape.heads * (1 + shape.head_dim * shape.state)
    edges = (shape.taps - 1) * (2 * channels + shape.heads)
    others = (len(shape.counts) - 1) * (left + edges) * max(4, shape.itemsize)
    return [Traffic(others, others)] * len(shape.counts)


def _scan_all_to_all(shape: ScanShape) -> list[Traffic]:
    ranks, tokens = len(shape.counts), sum(shape.counts)
    heads = shape.heads // ranks
    y = heads * shape.head_dim * shape.itemsize
    directions = 2 * max(1, shape.groups // ranks) * shape.state * shape.itemsize
    given = y + directions + heads * shape.step_itemsize
    return [
        Traffic(
            (tokens - own) * given + own * (ranks - 1) * y, (tokens - own) * y + own * (ranks - 1) * given
        )
        for own in shape.counts
    ]


_SCAN: dict[str, Callable[[ScanShape], list[Traffic]]] = {"states": _states, "all_to_all": _scan_all_to_all}
SCAN_FORMS = tuple(_SCAN)


def scan_traffic(form: str, shape: ScanShape) -> tuple[Traffic, ...]:
    """Bytes of each rank; nothing moves where no document has tokens on two ranks.

    Raises:
        ValueError: the form is not possible (a fault of the caller).
    """
    refusal = scan_refusal(form, shape.heads, shape.groups, len(shape.counts))
    if refusal:
        raise ValueError(refusal)
    if not crosses(shape.lengths, shape.counts):
        return (NOTHING,) * len(shape.counts)
    return tuple(_SCAN[form](shape))


@lru_cache(maxsize=64)
def choose_scan(shape: ScanShape) -> Choice:
    """The possible form that moves the fewest bytes over all ranks, ``states`` of equal ones."""
    refused = {form: scan_refusal(form, shape.heads, shape.groups, len(shape.counts)) for form in _SCAN}
    return _fewest({form: scan_traffic(form, shape) for form in _SCAN if not refused[form]}, refused)
