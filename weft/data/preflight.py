"""What can be known of the data before any work and before torch is imported: missing files, bad headers."""

from collections.abc import Callable, Iterator
from functools import partial

from weft.config.errors import DataError, Problem
from weft.data.blend import plan_splits
from weft.data.indexed import open_tokens
from weft.data.sources import open_source, tokenized_prefix
from weft.data.tokenizer import load_tokenizer
from weft.spec.data import DataConfig


def check_sources(config: DataConfig, vocab_limit: int) -> Iterator[Problem]:
    """Every file, folder, package, index and tokenizer that is missing or damaged, without reading texts."""
    if config.tokenizer.path:
        yield from _try("tokenizer.path", lambda: load_tokenizer(config.tokenizer).check_size(vocab_limit))
    if config.source == "mock" and not config.blend:
        return
    where = "blend" if config.blend else "source"
    try:
        plan = plan_splits(config)
    except DataError as error:
        yield Problem(where, str(error))
        return
    for name in dict.fromkeys(name for recipe in plan.splits.values() for name in recipe.names):
        prefix = tokenized_prefix(name, plan.base)
        look = (
            partial(open_source, name, config, plan.base) if prefix is None else partial(open_tokens, prefix)
        )
        yield from _try(where, look)


def _try(path: str, look: Callable[[], object]) -> Iterator[Problem]:
    try:
        look()
    except DataError as error:
        yield Problem(path, str(error))
