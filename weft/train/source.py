"""The data of a run: packed text, or samples with pictures and sound, behind one face."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data.corpus import build_corpus
from weft.data.multimodal import is_multimodal, open_multimodal
from weft.data.order import Loader
from weft.data.packed import PackedLoader, PackedSplit
from weft.data.stream import Split
from weft.data.tokenizer import Tokenizer
from weft.spec.data import DataConfig
from weft.spec.run import RunConfig
from weft.train.encode import Fetch


@dataclass(frozen=True)
class Source:
    """What a run reads.

    Attributes:
        tokenizer: of texts; random tokens have none.
        splits: ``train``, and ``valid`` and ``test`` where there are.
        fetch: reads what encoders need; None where there are no items.
    """

    tokenizer: Tokenizer | None
    splits: Mapping[str, Split | PackedSplit]
    fetch: Fetch | None = None

    @property
    def graded(self) -> bool:
        """Whether samples are questions with answers, so that accuracy means something."""
        return self.fetch is not None

    def loader(self, config: RunConfig, state: dict[str, Any] | None) -> Loader | PackedLoader:
        """Samples of the training split, from a position on."""
        train, data, seed, depths = self.splits["train"], config.data, config.run.seed, config.model.depths
        if isinstance(train, PackedSplit):
            return PackedLoader(train, data.seq_length, depths, seed, data.lookahead, state)
        return Loader(train, data.seq_length, depths, seed, state)


def open_source(
    config: RunConfig, data: DataConfig, notify: Callable[[str], None] = lambda line: None
) -> Source:
    """Index what is not in the cache yet, and open all splits.

    Raises:
        DataError: something cannot be used; the message names file and place.
    """
    cache, vocab = Path(config.cache), config.model.vocab_size
    if not is_multimodal(data, config.encoders):
        corpus = build_corpus(data, vocab, cache, notify)
        return Source(corpus.tokenizer, corpus.splits)
    found = open_multimodal(data, config.encoders, vocab, cache, notify)
    return Source(found.tokenizer, found.splits, found.media.piece)
