"""Random tokens from a fixed seed, for dry runs: no files, no cache."""

import numpy as np

from weft.data.stream import Split, Stream, make_split
from weft.data.tokenizer import Tokenizer
from weft.spec.data import DataConfig

_LONGEST = 1024


def mock_split(config: DataConfig, vocab_limit: int, tokenizer: Tokenizer | None) -> dict[str, Split]:
    """Training and validation splits of uniform tokens, documents of 1 to 1024; a "byte" is a token here."""
    vocab = min(vocab_limit, tokenizer.vocab_size) if tokenizer else vocab_limit
    held = max(64, int(config.mock_tokens * config.valid_fraction)) if config.valid_fraction else 0
    sizes = {"train": config.mock_tokens - held, "valid": held}
    return {
        name: make_split(name, [_stream(name, number, size, vocab, tokenizer)])
        for number, (name, size) in enumerate(sizes.items())
        if size > 0
    }


def _stream(name: str, seed: int, size: int, vocab: int, tokenizer: Tokenizer | None) -> Stream:
    random = np.random.default_rng(seed)
    data = random.integers(0, vocab, size, dtype=np.int32)
    lengths = random.integers(1, _LONGEST + 1, size)  # more documents than needed; cut where the tokens end
    bounds = np.concatenate([[0], np.minimum(np.cumsum(lengths), size)])
    bounds = bounds[: int(np.searchsorted(bounds, size)) + 1]
    start, end = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (0, 0)
    data[bounds[1:] - 1] = end
    return Stream(
        name="mock",
        key=f"mock-{name}-{vocab}-{size}-{end}",
        data=data,
        bounds=bounds.tolist(),
        start_token=start,
        bytes=size,
        longest=int(np.diff(bounds).max()),
    )
