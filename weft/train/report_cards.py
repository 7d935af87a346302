"""The pictures of the report, each with a title, a unit and one sentence on how to read it."""

import math
from html import escape
from typing import Any, NamedTuple

import numpy as np

from weft.train.figures import Paint, draw, heat_maps, lines, load_key, loss_chart, loss_top, reading
from weft.train.record import Record, Series
from weft.train.units import BASELINES, printable

_WIDTH = {6: 9.9, 3: 4.75, 2: 3.05}  # inches of a picture by the columns of the grid that its card takes
_SPANS = {1: (6,), 2: (3, 3), 3: (2, 2, 2), 4: (3, 3, 3, 3), 5: (2, 2, 2, 3, 3)}
# key of the rows -> title, unit, how to read it, how to draw it
_PANELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "lr": ("Learning rate", "AdamW step size", "", {"zero": True, "exact": True}),
    "tokens_per_second": ("Throughput", "tokens per second", "Evaluation not counted.", {"zero": True}),
    "mfu": (
        "Model FLOPs utilization",
        "share of peak",
        "Arithmetic of the model against the device's peak; recomputation is not counted.",
        {"zero": True, "scale": "percent"},
    ),
    "memory_gib": ("Memory", "GiB", "The largest use so far.", {"zero": True, "exact": True}),
}


class Card(NamedTuple):
    """One picture; ``height`` is in inches and makes it as wide as the page, ``key`` is a second SVG."""

    title: str
    caption: str
    paint: Paint
    height: float = 0.0
    key: str = ""


def grid(cards: list[Card]) -> str:
    """Cards side by side, full-width ones on rows of their own."""
    spans = iter(_SPANS.get(sum(not card.height for card in cards), ()))
    figures = [_figure(card, 6 if card.height else next(spans)) for card in cards]
    return f'<div class="grid">{"".join(figures)}</div>'


def _figure(card: Card, span: int) -> str:
    svg = draw(card.paint, _WIDTH[span], card.height or (2.4 if span == 6 else 2.15), card.title)
    caption = f"<figcaption>{escape(card.caption)}</figcaption>" if card.caption else ""
    key = f'<div class="key">{card.key}</div>' if card.key else ""
    return f'<figure class="card s{span}"><h3>{escape(card.title)}</h3>{key}{svg}{caption}</figure>'


def _panel(record: Record, key: str) -> list[Card]:
    title, unit, caption, look = _PANELS[key]
    series = record.series(key)
    return [Card(title, caption, lines({"": series}, unit, **look))] if series else []


def learning_cards(record: Record) -> list[Card]:
    """Loss beside its baselines, the parts of the loss, learning rate and gradient norm."""
    train = _train(record)
    if not train:
        return []
    cards = [_loss_card(record)]
    mtp = _used(record, mtp_loss="MTP")
    caption = "MTP: mean over its depths, before its weight in the total." if mtp else ""
    cards.append(Card("Loss by objective", caption, lines({"LM": train, **mtp}, "nats per token")))
    if router := _used(record, aux_loss="balance", z_loss="z-loss"):
        caption = "As added to the loss that is minimized."
        cards.append(Card("Router losses", caption, lines(router, "nats per token", zero=True)))
    return cards + _accuracy_card(record) + _panel(record, "lr") + _norm_card(record)


def _train(record: Record) -> Series:
    return record.series("lm_loss") or record.series("loss")


def _used(record: Record, **names: str) -> dict[str, Series]:
    """Parts of the loss that the run has: not missing, and not zero throughout."""
    found = {name: record.series(key) for key, name in names.items()}
    return {name: series for name, series in found.items() if series.finite.any()}


def _ended(record: Record, series: Series, value: float | None) -> Series:
    """With the value of the closing evaluation, which has no row, at the last step."""
    last = record.rows[-1]["step"] if record.rows else 0
    if value is None or last in series.steps:
        return series
    return Series(np.append(series.steps, last), np.append(series.values, value))


def _accuracy_card(record: Record) -> list[Card]:
    answers = record.summary.get("answers") or {}
    series = _ended(record, record.series("valid_accuracy"), answers.get("accuracy"))
    if not series:
        return []
    best = max((answers.get("baselines") or {}).items(), key=lambda one: one[1], default=None)
    caption = "Samples answered without a wrong token; the last value is of all, those before of a part."
    words = f"{caption} Dashed: {printable(best[0])}." if best else caption
    limit = (float(best[1]), f"{best[1]:.1%}") if best else None
    paint = lines({"": series}, "held-out samples", zero=True, scale="percent", exact=True, limit=limit)
    return [Card("Accuracy", words, paint)]


def _norm_card(record: Record) -> list[Card]:
    norm, clip, caption, limit = record.series("grad_norm"), record.setting("optimizer.clip_grad"), "", None
    if not norm:
        return []
    if clip:
        clip = float(clip)
        caption = (
            f"Before clipping; {np.mean(norm.finite > clip):.0%} of the steps are scaled down to {clip:g}."
        )
        limit = (clip, f"clip {clip:g}") if norm.finite.max() > 0.5 * clip else None
    return [Card("Gradient norm", caption, lines({"": norm}, "2-norm, log scale", scale="log", limit=limit))]


def _loss_card(record: Record) -> Card:
    factor, train = record.bits_per_byte(), _train(record)
    train = Series(train.steps, train.values * (factor or 1.0))
    valid = record.series("valid_bits_per_byte" if factor else "valid_loss")
    last = (record.summary.get("valid") or {}).get("bits_per_byte" if factor else "loss")
    valid = _ended(record, valid, last)
    given = record.summary.get("baselines") or {}
    baselines = {name: given[key] for key, name in BASELINES.items() if factor and given.get(key)}
    words = f"Lower is better. {reading(len(train.steps))}"
    if factor:
        rate = factor * math.log(2)
        words += f" Training: next-token loss, at {rate:.3f} tokens per byte as in the validation text."
    if baselines:
        words += " Dashed: what simpler models reach on the same validation text."
    if hidden := int((train.finite > loss_top(train, valid, baselines)).sum()):
        count = f"{hidden:,} of {len(train.steps):,} steps"
        words += f" {count} lie above the axis, up to {train.finite.max():.3g}."
    unit = "bits per byte" if factor else "nats per token"
    paint = loss_chart(train, valid, baselines, unit, record.not_finite())
    return Card("Training and validation loss", words, paint, height=4.1)


def speed_cards(record: Record) -> list[Card]:
    """Throughput, utilization and memory over the run."""
    return [card for key in ("tokens_per_second", "mfu", "memory_gib") for card in _panel(record, key)]


def expert_cards(record: Record) -> list[Card]:
    """Where the routers send the tokens: a map per MoE layer, and what it means in numbers."""
    loads = {unit: record.loads(unit) for unit in record.units("expert_load")}
    loads = {unit: found for unit, found in loads.items() if len(found[0])}
    if not loads:
        return []
    columns = {1: 1, 2: 2, 4: 2}.get(len(loads), 3 if len(loads) <= 9 else 4)
    height = 0.45 + 1.55 * -(-len(loads) // columns)
    caption = "Tokens that each expert receives, relative to an even share of its layer. Blank is even."
    key = draw(load_key, 3.6, 0.45, "Colours of the expert load maps")
    cards = [Card("Expert load", caption, heat_maps(loads, columns), height, key)]
    stats = {unit: load_stats(load) for unit, (_, load) in loads.items()}
    busiest, entropy, idle = ({u: Series(loads[u][0], stats[u][i]) for u in loads} for i in range(3))
    fair = "1 if all experts receive the same, 0 if one receives all."
    cards += [
        Card("Busiest expert", "Its load over the mean load of its layer.", lines(busiest, "× mean load")),
        Card("Load entropy", fair, lines(entropy, "share of ln(experts)")),
        Card("Idle experts", "No token chose them at a step.", lines(idle, "experts", zero=True, exact=True)),
    ]
    if entropies := _by_unit(record, "router_entropy"):
        caption = "How undecided a router is about one token, mean over tokens."
        cards.append(Card("Router entropy", caption, lines(entropies, "nats")))
    if rates := _by_unit(record, "drop_rate"):
        total = record.series("drop_rate_total")
        mean = f" {np.mean(total.finite):.2%} of all choices over the run." if total else ""
        caption = f"Choices of experts that had no room left (capacity).{mean}"
        cards.append(Card("Drop rate", caption, lines(rates, "share", zero=True, scale="percent")))
    return cards


def _by_unit(record: Record, key: str) -> dict[str, Series]:
    """A key that has one value per unit, of the units for which it was measured."""
    found = {unit: record.series(key, unit) for unit in record.units(key)}
    return {unit: series for unit, series in found.items() if series}


def load_stats(load: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``load[rows, experts]``, relative to an even share, says per row.

    Returns:
        Greatest load over the mean; entropy over its maximum, ln(experts); experts without a token.
    """
    share = load / load.shape[1]
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1)
    return load.max(axis=1), entropy / math.log(max(2, load.shape[1])), (load == 0).sum(axis=1).astype(float)
