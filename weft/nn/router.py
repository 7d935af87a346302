"""Sigmoid router with correction bias, balance losses and limited capacity.

Scores, bias and group limit: DeepSeek-V3 (arXiv 2412.19437, 2.1.2). What is counted, dropped or drawn at
random depends on the tokens and their global places, never on who routes them: N ranks do what one does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

from weft.config.errors import RunError
from weft.nn.context import Context, Ran, RouterStats
from weft.nn.module import Layer
from weft.nn.slots import Product, Total
from weft.ops.mix import uniform
from weft.ops.router import (
    choice_frequency,
    choice_share,
    count_choices,
    document_balance,
    fits,
    route,
    tally,
    z_loss,
)
from weft.ops.router.capacity import Groups, capacity, group, importance, pack, unpack
from weft.spec.layers import RouterConfig


class Choice(NamedTuple):
    """What a router decides.

    Attributes:
        weights: of each slot; 0 where it goes nowhere.
        experts: of each slot; -1 goes nowhere.
        stats: None while generating.
        bound: rows that each expert is padded to; None is as many as come.
    """

    weights: Float[Tensor, "rows top_k"]
    experts: Int[Tensor, "rows top_k"]
    stats: RouterStats | None
    bound: int | None


class Router(Layer):
    """Scores from the full width; choices by score plus bias; weights from the scores.

    Everything is computed in the dtype of the bias, which no policy reduces: fp32, or fp64 under fp64.

    Attributes:
        block: of so many tokens here, those that are read, and which features of them; set by a layout that
            cuts features.
        parts: of so many tokens of a whole run, those that each rank routes; set by a layout. What is dropped
            is decided together only for groups of tokens that lie on several ranks.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.own(config.params())
        self.product = Product()
        self.total, self.everyone = Total("tokens"), Total("batch")
        self.block: Callable[[int], tuple[slice, range]] | None = None
        self.parts: Callable[[int], tuple[range, ...]] | None = None
        self._bounds: dict[tuple[int, ...], int] = {}

    def choose(self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str) -> Choice:
        """Which experts the tokens of these rows go to.

        Raises:
            RunError: choices to replay do not fit this router.
        """
        c = self.config
        weight = self.weight.to(self.bias.dtype)
        logits = self.product(self._input(x, ctx, key), weight, ctx.segments.tokens)
        recorded = self._recorded(logits, ctx, key)
        ran = ctx.replay.ran.get(key)
        forced = recorded is not None if ran is None else ran.forced
        weights, experts, scores = route(
            logits,
            self.bias,
            c.top_k,
            groups=(c.expert_groups, c.top_groups) if c.expert_groups > 1 else None,
            normalize=c.normalize,
            scale=c.scale,
            choices=self._given(recorded, logits, ctx),
            holes=forced,
        )
        kept = self._kept(weights, experts, recorded, ctx, ran)
        weights = weights.masked_fill(~kept, 0.0) if kept is not None else weights
        # What is dropped is recorded as well: the weights beside it are shares of a sum that it is part of.
        record = torch.where(kept, experts, -2 - experts) if kept is not None else experts
        ctx.replay.choices[key] = record
        if ran is None and torch.is_grad_enabled() and not ctx.cache:
            ran = ctx.replay.ran[key] = Ran(self._frequency(experts, logits, ctx, key), forced)
        stats = None if ctx.cache else self._stats(logits, scores, experts, kept, ctx, ran)
        return Choice(weights, experts if kept is None else record.clamp_min(-1), stats, self._bound(ctx))

    def _input(
        self, x: Float[Tensor, "tokens embed"], ctx: Context, key: str
    ) -> Float[Tensor, "tokens embed"]:
        """``x``, with jitter (Switch Transformer, arXiv 2101.03961, 2.2) while training."""
        x, jitter = x.to(self.bias.dtype), self.config.jitter
        if not jitter or ctx.cache or not torch.is_grad_enabled():
            return x
        rows, columns = (
            self.block(ctx.segments.tokens) if self.block else (ctx.rows, range(self.config.embed))
        )
        features = torch.arange(columns.start, columns.stop, device=x.device)
        drawn = uniform(f"jitter/{ctx.seed}/{key}", _places(ctx, x.device)[rows], features)
        return x * (1 - jitter + 2 * jitter * drawn).to(x.dtype)

    def _recorded(
        self, logits: Float[Tensor, "rows experts"], ctx: Context, key: str
    ) -> Int64[Tensor, "rows top_k"] | None:
        """Choices to force; None where the router chooses."""
        given = ctx.replay.choices.get(key)
        if given is None or key in ctx.replay.ran:  # the latter: this is the recomputation
            return given
        fix = "replay what this model chose for the same tokens under the same layout"
        shape = (len(logits), self.config.top_k)
        if given.shape != shape:
            wrong = f"have shape {tuple(given.shape)}, not {shape} (tokens here, experts of each)"
            raise RunError(f"choices to replay in {key} {wrong}; {fix}")
        given = given.to(torch.int64)
        chosen = _chosen(given).sort(-1).values
        if (chosen >= self.config.experts).any():
            wrong = f"name expert {chosen.max().item()}, but there are {self.config.experts}"
            raise RunError(f"choices to replay in {key} {wrong}; {fix}")
        if ((chosen[:, 1:] == chosen[:, :-1]) & (chosen[:, 1:] >= 0)).any():
            raise RunError(f"choices to replay in {key} name an expert twice for one token; {fix}")
        return given.to(logits.device)

    def _given(
        self,
        recorded: Int64[Tensor, "rows top_k"] | None,
        logits: Float[Tensor, "rows experts"],
        ctx: Context,
    ) -> Int64[Tensor, "rows top_k"] | None:
        """Experts that are not chosen by score."""
        if recorded is not None:
            return _chosen(recorded)
        if not self.config.force_balance:
            return None
        slots = torch.arange(self.config.top_k, device=logits.device)
        places = _places(ctx, logits.device)[ctx.rows].unsqueeze(1)
        return (places * self.config.top_k + slots) % self.config.experts

    def _kept(
        self,
        weights: Float[Tensor, "rows top_k"],
        experts: Int64[Tensor, "rows top_k"],
        recorded: Int64[Tensor, "rows top_k"] | None,
        ctx: Context,
        ran: Ran | None,
    ) -> Bool[Tensor, "rows top_k"] | None:
        """Which choices go to their experts; None if all do."""
        limited = self.config.capacity_factor and not ctx.cache
        if limited and not ran:
            return self._fits(weights, experts if recorded is None else recorded.clamp_min(-1), ctx)
        if recorded is None or not (limited or ran is None or ran.forced):
            return None
        return recorded >= 0

    @torch.no_grad()
    def _fits(
        self, weights: Float[Tensor, "rows top_k"], experts: Int64[Tensor, "rows top_k"], ctx: Context
    ) -> Bool[Tensor, "rows top_k"]:
        """Which choices have room, decided by all ranks that have tokens of a group."""
        groups = self._groups(ctx)
        limits = [self._capacity(length) for length in groups.lengths]
        ranking = importance(weights) if self.config.drop_policy == "probs" else torch.zeros_like(experts)
        taken = fits(ranking, experts, groups.here, limits)
        if groups.shared:
            mine = pack(ranking, experts)
            packed = mine.new_zeros(sum(groups.shared), self.config.top_k)
            for here, there, length in groups.pieces:
                packed[there : there + length] = mine[here : here + length]
            limits = [self._capacity(length) for length in groups.shared]
            together = fits(*unpack(self.total(packed)), groups.shared, limits)
            for here, there, length in groups.pieces:
                taken[here : here + length] = together[there : there + length]
        return taken

    def _groups(self, ctx: Context) -> Groups:
        whole = ctx.segments.whole
        parts = self.parts(whole.tokens) if self.parts else None
        parts = () if self.total.alone else parts
        return group(whole.windows or whole.lengths, self.config.capacity_tokens, _own(ctx), parts)

    def _capacity(self, tokens: int) -> int:
        c = self.config
        return capacity(tokens, c.capacity_factor, c.top_k, c.experts)

    def _bound(self, ctx: Context) -> int | None:
        """Rows that an expert can get from one rank: one number for all ranks and forward passes.

        None where ranks have not agreed on it: where one reads more than another, their own numbers differ.
        """
        if not self.config.pad_to_capacity or ctx.cache:
            return None
        whole = ctx.segments.whole
        full = ctx.full or (whole.windows or whole.lengths if self.everyone.alone else ())
        if not full:
            return None
        if full not in self._bounds:
            counts = range(1, len(full) + 1)  # of samples: readers' shares differ
            self._bounds[full] = max(self._rows(full[:count]) for count in counts)
        return self._bounds[full]

    def _rows(self, windows: tuple[int, ...]) -> int:
        """The same for these samples."""
        tokens, most = sum(windows), 0
        for own in self.parts(tokens) if self.parts else (range(tokens),):
            groups = group(windows, self.config.capacity_tokens, own)
            pairs = zip(groups.lengths, groups.here, strict=True)
            most = max(most, sum(min(self._capacity(length), here) for length, here in pairs))
        return most

    def _stats(
        self,
        logits: Float[Tensor, "rows experts"],
        scores: Float[Tensor, "rows experts"],
        experts: Int64[Tensor, "rows top_k"],
        kept: Bool[Tensor, "rows top_k"] | None,
        ctx: Context,
        ran: Ran | None,
    ) -> RouterStats:
        """Losses (only where their coefficients ask for them), entropy and load, of the tokens here."""
        c, zero = self.config, logits.new_zeros(())
        counts = tally(experts, c.experts)
        drop = counts.new_zeros(()) if kept is None else ((experts >= 0) & ~kept).sum()
        if ran is None:
            return RouterStats(zero, zero, zero, counts, drop)
        balance = zero
        if ran.frequency is not None:
            balance = document_balance(scores, _documents(ctx, scores.device), ran.frequency)
        z = c.z_coef * z_loss(logits) if c.z_coef else zero
        with torch.no_grad():
            share = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
            entropy = -torch.xlogy(share, share).sum() + 0 * logits.sum()  # NaN where a logit is infinite
        return RouterStats(balance, z, entropy, counts, drop)

    @torch.no_grad()
    def _frequency(
        self,
        experts: Int64[Tensor, "rows top_k"],
        like: Float[Tensor, "rows experts"],
        ctx: Context,
        key: str,
    ) -> Float[Tensor, "documents experts"] | None:
        """What the balance losses together multiply the scores of each document by; None if they are off."""
        c, lengths = self.config, ctx.segments.whole.lengths
        if not (c.aux_coef or c.batch_coef or c.global_coef):
            return None
        table = like.new_zeros(len(lengths), c.experts)
        if c.aux_coef:
            ids = _documents(ctx, like.device)
            chosen = self.total(count_choices(experts, ids, len(lengths), c.experts))
            sizes = torch.tensor(lengths, dtype=like.dtype).to(like.device)
            table += c.aux_coef * choice_frequency(chosen, sizes, c.top_k)
        if c.batch_coef or c.global_coef:
            seen = self.everyone(tally(experts, c.experts))
            table += c.batch_coef * choice_share(seen, like.dtype)
            ctx.tally[key] = seen + ctx.tally.get(key, 0)
            table += c.global_coef * choice_share(ctx.tally[key], like.dtype)
        return table


def _chosen(record: Int64[Tensor, "rows top_k"]) -> Int64[Tensor, "rows top_k"]:
    """The experts of recorded choices, those that had no room too; -1 is none."""
    return torch.where(record < -1, -2 - record, record)


def _own(ctx: Context) -> range:
    """Tokens of the whole run that are routed here."""
    start = ctx.segments.start
    return range(start, start + ctx.segments.tokens)[ctx.rows]


def _documents(ctx: Context, device: torch.device) -> Int64[Tensor, " rows"]:
    """The document of each token routed here, among those of the whole run."""
    own = _own(ctx)
    return ctx.segments.whole.ids(device)[own.start : own.stop]


def _places(ctx: Context, device: torch.device) -> Int64[Tensor, " tokens"]:
    """The global place of each token; where nobody says, its place in the run."""
    start = ctx.segments.start
    found: Shaped[Tensor, " tokens"] | None = ctx.places
    return torch.arange(start, start + ctx.segments.tokens, device=device) if found is None else found
