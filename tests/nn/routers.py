"""Routers by themselves, on one rank or cut over several threads, and what they should do in plain loops."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.nn.context import Context, Replay
from weft.nn.router import Choice, Router
from weft.nn.slots import Total
from weft.ops.segments import Segments
from weft.parallel import moves
from weft.parallel.comm import Comm
from weft.parallel.threads import run_threads
from weft.plan.shard import share
from weft.spec.layers import RouterConfig

EMBED, EXPERTS, TOP_K = 6, 8, 3
KEY = "layers.1"


def make_router(dtype: torch.dtype = torch.float64, **settings: Any) -> Router:
    """A router with random weight and bias."""
    config = RouterConfig(**{"embed": EMBED, "experts": EXPERTS, "top_k": TOP_K, "scale": 2.5} | settings)
    assert not list(config.problems())
    router = Router(config).to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (router.weight, router.bias):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.7)
    return router


def tokens(count: int, seed: int = 5) -> Tensor:
    """Inputs of a router."""
    return torch.randn(count, EMBED, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(choice: Choice, rows: Tensor) -> Tensor:
    """Something that depends on the weights of all slots and on the losses."""
    assert choice.stats
    mixing = torch.cos(rows.detach().sum(-1, keepdim=True) + choice.experts)
    return (choice.weights * mixing).sum() + choice.stats.balance + choice.stats.z


class Result(NamedTuple):
    """Of all tokens in order, and sums over ranks."""

    weights: Tensor
    experts: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    sums: list[float]  # balance, z, entropy, drop
    counts: list[int]
    bounds: list[int | None]


class Summed(Total):
    """The sum over the ranks of a communicator, counting its calls."""

    alone = False

    def __init__(self, over: Any, comm: Comm) -> None:
        super().__init__(over)
        self.comm, self.calls = comm, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return moves.total(self.comm, x)


class Cut(NamedTuple):
    """``dp`` equal runs of tokens, each cut into parts of ``cp`` tokens, each of these over ``tp`` ranks."""

    dp: int
    cp: tuple[int, ...]
    tp: int

    @property
    def ranks(self) -> int:
        return self.dp * len(self.cp) * self.tp


ONE = Cut(1, (0,), 1)


def routed(
    router: Router,
    x: Tensor,
    lengths: Sequence[tuple[int, ...]],
    windows: tuple[int, ...] = (),
    cut: Cut = ONE,
    change: Callable[[Context, int], None] = lambda ctx, rank: None,
    know_parts: bool = False,
) -> Result:
    """What ranks make of ``x``: of each run of tokens one after the other on one rank, else cut.

    Args:
        router: copied for each rank.
        x: tokens of all runs.
        lengths: documents of each run.
        windows: samples of each run.
        cut: which rank has what; ONE routes all runs as one.
        change: what a rank does to its context before.
        know_parts: tell routers what the others route.
    """

    def work(comm: Comm) -> tuple[Any, ...]:
        own = _laid_out(router, comm, cut, know_parts)
        part, segments, rows = _share(comm.rank, x, lengths, windows, cut)
        at = segments.start + (comm.rank // (len(cut.cp) * cut.tp)) * sum(lengths[0])
        places = torch.arange(at, at + segments.tokens)
        ctx = Context(segments, Replay(), rows=rows, places=places, seed=11)
        change(ctx, comm.rank)
        leaf = part.clone().requires_grad_()
        choice = own.choose(leaf, ctx, KEY)
        objective(choice, leaf).backward()
        assert choice.stats
        assert leaf.grad is not None
        assert own.weight.grad is not None
        s = choice.stats
        sums = torch.stack([s.balance, s.z, s.entropy, s.drop.double()]).detach()
        made = choice.weights.detach(), choice.experts, leaf.grad, own.weight.grad
        return *made, sums, s.counts, choice.bound

    found = zip(*run_threads(cut.ranks, work), strict=True)
    weights, experts, grads, weight_grads, sums, counts, bounds = found
    whole = (torch.cat(parts) for parts in (weights, experts, grads))
    return Result(*whole, sum(weight_grads), sum(sums).tolist(), sum(counts).tolist(), list(bounds))


def _laid_out(router: Router, comm: Comm, cut: Cut, know_parts: bool) -> Router:
    """A copy of the router for one rank."""
    own = deepcopy(router)
    if cut is not ONE:
        size = len(cut.cp) * cut.tp
        first = comm.rank // size * size
        own.total = Summed("tokens", comm.group(range(first, first + size)))
        own.everyone = Summed("batch", comm)
    if know_parts:
        own.parts = lambda total: _parts(total, cut)
    return own


def _share(
    rank: int, x: Tensor, lengths: Sequence[tuple[int, ...]], windows: tuple[int, ...], cut: Cut
) -> tuple[Tensor, Segments, slice]:
    """Tokens, segments and rows of a rank."""
    if cut is ONE:
        flat = tuple(n for run in lengths for n in run)
        return x, Segments(flat, windows * len(lengths)), slice(None)
    run, place = divmod(rank, len(cut.cp) * cut.tp)
    part, row = divmod(place, cut.tp)
    segments = Segments(lengths[run], windows).part(cut.cp, part)
    own = share(segments.tokens, cut.tp, row)
    start = sum(map(sum, lengths[:run])) + segments.start
    return x[start + own.start : start + own.stop], segments, slice(own.start, own.stop)


def _parts(total: int, cut: Cut) -> tuple[range, ...]:
    """Tokens of each rank of a run; of a shorter one those that it has."""
    starts = (sum(cut.cp[:i]) for i in range(len(cut.cp)))
    parts = zip(starts, cut.cp, strict=True)
    inside = [(at, share(n, cut.tp, row)) for at, n in parts for row in range(cut.tp)]
    return tuple(range(min(total, at + own.start), min(total, at + own.stop)) for at, own in inside)


def assert_same(a: Result, b: Result, tolerance: float = 1e-12) -> None:
    """Equal choices and counts; everything else to rounding errors."""
    assert torch.equal(a.experts, b.experts)
    assert a.counts == b.counts
    for one, other in zip(a[:4], b[:4], strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, one.abs().max().item())
    for one, other in zip(a.sums, b.sums, strict=True):
        assert math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)


def plain_loss(scores: Tensor, experts: Tensor, group: list[int], coef: float) -> Tensor:
    """``coef * sum_t sum_i f_i p_ti`` with f from the tokens of t's group: three loops."""
    total = scores.new_zeros(())
    for t, own in enumerate(group):
        members = [u for u, other in enumerate(group) if other == own]
        for i in range(scores.shape[1]):
            chosen = sum((experts[u] == i).sum().item() for u in members)
            frequency = scores.shape[1] / (experts.shape[1] * len(members)) * chosen
            total = total + coef * frequency * scores[t, i] / scores[t].sum()
    return total


def plain_capacity(
    weights: Tensor, experts: Tensor, groups: Sequence[int], factor: float, policy: str
) -> Tensor:
    """Which pairs have room, group by group and expert by expert."""
    kept = torch.zeros_like(experts, dtype=torch.bool)
    start = 0
    for length in groups:
        room = max(1, math.ceil(round(factor * length * experts.shape[1] / EXPERTS, 9)))
        for expert in range(EXPERTS):
            pairs = (experts[start : start + length] == expert).nonzero().tolist()
            if policy == "probs":
                pairs.sort(key=lambda pair: -weights[start + pair[0], pair[1]].item())
            for t, s in pairs[:room]:
                kept[start + t, s] = True
        start += length
    return kept
