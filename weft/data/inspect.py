"""What ``weft data inspect`` prints."""

from collections.abc import Iterator

from weft.data.corpus import Corpus
from weft.data.order import Loader
from weft.data.stream import Split, Stream
from weft.data.tokenizer import Tokenizer

_EDGE = "\u2551"  # where one document ends and the next begins
_LOOK = 64  # samples looked through for a boundary


def describe(corpus: Corpus, seq_length: int, seed: int, shown: int = 256) -> str:
    """Sizes of every split and source, and ``shown`` tokens around a document boundary of a sample."""
    return "\n".join(_lines(corpus, seq_length, seed, shown))


def _lines(corpus: Corpus, seq_length: int, seed: int, shown: int) -> Iterator[str]:
    if corpus.tokenizer:
        kind = corpus.tokenizer
        ends = f"begin {kind.bos!r} ({kind.bos_id}), end {kind.eos!r} ({kind.eos_id})"
        yield f"tokenizer  {kind.vocab_size:,} tokens, {ends}"
    for split in corpus.splits.values():
        yield ""
        yield f"{split.name}  {_sizes(split)}"
        for stream, weight in zip(split.streams, split.weights, strict=True):
            yield f"  {weight / sum(split.weights):7.2%}  {stream.name}: {_stream(stream)}"
        if split.baselines:
            bits = ", ".join(f"{name} {value:.3f}" for name, value in split.baselines.items())
            yield f"  to beat, in bits per byte: {bits}"
    yield ""
    yield _sample(corpus.splits["train"], corpus.tokenizer, seq_length, seed, shown)


def _sizes(of: Split | Stream) -> str:
    text = f", {of.bytes:,} bytes, {of.bytes / of.tokens:.2f} bytes per token" if of.bytes else ""
    return f"{of.documents:,} documents, {of.tokens:,} tokens{text}"


def _stream(stream: Stream) -> str:
    left = "".join(f", {count:,} left out ({reason})" for reason, count in sorted(stream.skipped.items()))
    return f"{_sizes(stream)}, longest {stream.longest:,} tokens{left}"


def _sample(split: Split, tokenizer: Tokenizer | None, seq_length: int, seed: int, shown: int) -> str:
    """The first sample that holds a document boundary (sample 0 if none does soon), shown around it."""
    loader = Loader(split, seq_length, 0, seed)
    batches = [loader.microbatch(sample, 1) for sample in range(_LOOK)]
    batch = next((b for b in batches if len(b.lengths) > 1), batches[0])
    low = max(0, min(batch.lengths[0] - shown // 2, seq_length - shown))
    pieces, start = [], 0
    for length in batch.lengths:
        ids = batch.tokens[max(low, start) : min(start + length, low + shown)].tolist()
        if ids:
            pieces.append(tokenizer.decode(ids, special=True) if tokenizer else " ".join(map(str, ids)))
        start += length
    head = (
        f"sample {batch.samples[0]} of train, tokens {low} to {min(low + shown, seq_length)} of {seq_length}"
    )
    return f"{head} ({_EDGE} is a document boundary):\n{_EDGE.join(pieces)}"
