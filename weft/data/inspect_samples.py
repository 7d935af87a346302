"""What ``weft data inspect`` prints of samples with media."""

from collections import Counter
from collections.abc import Iterator

from weft.data.media.items import Origin
from weft.data.multimodal import Multimodal
from weft.data.packed import PackedLoader, PackedSplit
from weft.spec.data import DataConfig


def describe_samples(data: Multimodal, config: DataConfig, seed: int, shown: int = 4) -> str:
    """Sizes of every split, what was left out, how full sequences are, and ``shown`` samples of the first."""
    return "\n".join(_lines(data, config, seed, shown))


def _lines(data: Multimodal, config: DataConfig, seed: int, shown: int) -> Iterator[str]:
    for split in data.splits.values():
        yield f"{split.name}  {sizes(split)}"
        yield from (f"  {n:,} left out ({reason})" for reason, n in sorted(split.skipped.items()))
    train = data.splits["train"]
    plan = PackedLoader(train, config.seq_length, 0, seed, config.lookahead).plan(0)
    fill = train.tokens / (len(plan) * config.seq_length)
    yield f"packed into {len(plan):,} sequences of {config.seq_length} tokens, {fill:.1%} full"
    for document in plan.window(0)[:shown]:
        yield ""
        yield from _sample(data, train, document)


def sizes(split: PackedSplit) -> str:
    """Samples, tokens and targets of a split, in words."""
    longest = max(source.longest for source in split.sources)
    counts = f"{split.documents:,} samples, {split.tokens:,} tokens, {split.targets:,} of them count"
    return f"{counts}, longest {longest:,} tokens"


def _sample(data: Multimodal, split: PackedSplit, document: int) -> Iterator[str]:
    """Its items, then its text, where a run of tokens that are no text stands as their number."""
    batch = split.document(document, 0)
    for placed in batch.items:
        origin, item = Origin.of(placed.item), placed.item
        shapes = ", ".join(
            f"{n} x {'x'.join(map(str, size))}" if n > 1 else "x".join(map(str, size))
            for size, n in Counter(item.sizes).items()
        )
        yield f"{origin.form} ({origin.place}): {shapes} for {item.encoder}, {item.rows} tokens"
    starts = {run.start: run.length for placed in batch.items for run in placed.places}
    pieces, at = list[str](), 0
    tokens = batch.tokens.tolist()
    for start, length in sorted(starts.items()):
        pieces += data.tokenizer.decode(tokens[at:start], special=True), f"[{length}]"
        at = start + length
    yield "".join([*pieces, data.tokenizer.decode(tokens[at:], special=True)])
