"""From a data configuration to tokenized, cached splits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.config.errors import DataError
from weft.data.baselines import compressed_bits, unigram_bits
from weft.data.blend import SPLITS, Plan, plan_splits
from weft.data.cache import cache_key, cached
from weft.data.indexed import check_id, check_pointers, open_tokens
from weft.data.mock import mock_split
from weft.data.parts import assign, read_documents, write_foreign, write_parts
from weft.data.sources import Document, Source, open_source, tokenized_prefix
from weft.data.stream import Split, Stream, make_split
from weft.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from weft.spec.data import DataConfig


@dataclass(frozen=True)
class Corpus:
    """Tokenized splits (``train``, and ``valid`` and ``test`` where there are) and their tokenizer.

    Mock data without ``data.tokenizer.path`` has none.
    """

    tokenizer: Tokenizer | None
    splits: dict[str, Split]


@dataclass(frozen=True)
class _Part:
    """One tokenized part of one source, and what its ``meta.json`` says."""

    stream: Stream
    counts: np.ndarray
    text: Path


def build_corpus(
    config: DataConfig, vocab_limit: int, cache: Path, notify: Callable[[str], None] = lambda line: None
) -> Corpus:
    """Tokenize what is not yet in ``cache`` and open all splits.

    Args:
        config: what to read.
        vocab_limit: the model's vocabulary size; larger token ids are refused.
        cache: directory of tokenized parts; may be shared by processes at the same time.
        notify: receives a line before each piece of slow work.

    Raises:
        DataError: a source, the blend or the tokenizer cannot be used; the message names file and place.
    """
    if config.source == "mock" and not config.blend:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer.path else None
        return Corpus(tokenizer, mock_split(config, vocab_limit, tokenizer))
    plan = plan_splits(config)
    tokenizer = _tokenizer(config, plan, cache, notify)
    tokenizer.check_size(vocab_limit)
    return Corpus(tokenizer, _Builder(config, plan, tokenizer, vocab_limit, cache, notify).splits())


@dataclass(frozen=True)
class _Builder:
    config: DataConfig
    plan: Plan
    tokenizer: Tokenizer
    limit: int
    cache: Path
    notify: Callable[[str], None]

    def splits(self) -> dict[str, Split]:
        """All splits; the training split first, whose counts the others' unigram baseline needs."""
        parts: dict[str, list[_Part]] = {}
        weights: dict[str, tuple[float, ...]] = {}
        for split, recipe in self.plan.splits.items():
            for name in recipe.names:
                for part, made in self._parts(name, split).items():
                    parts.setdefault(part, []).append(made)
            weights[split] = recipe.weights
        weights.setdefault("valid", ())  # held out: each source counts by its tokens
        names = [name for name in SPLITS if name in parts]
        return {name: self._split(name, parts[name], weights[name], parts["train"]) for name in names}

    def _split(self, name: str, parts: list[_Part], weights: tuple[float, ...], train: list[_Part]) -> Split:
        held_out = name not in self.plan.splits
        if held_out:  # a small source may have no document held out
            parts = [p for p in parts if p.stream.tokens]
        for part in parts:
            if not part.stream.tokens:
                raise DataError(f"{part.stream.name}: no text for the split {name!r}; the corpus is empty")
        if not parts:
            raise DataError(
                f"no document fell into the split {name!r}; raise data.valid_fraction = "
                f"{self.config.valid_fraction} or name a valid split in data.blend"
            )
        split = make_split(name, [p.stream for p in parts], weights)
        return split if name == "train" else replace(split, baselines=self._baselines(split, parts, train))

    def _baselines(self, split: Split, parts: list[_Part], train: list[_Part]) -> dict[str, float]:
        if not split.bytes:
            return {}
        size = max(self.tokenizer.vocab_size, *(len(p.counts) for p in [*parts, *train]))
        fitted, seen = (
            sum(np.pad(p.counts, (0, size - len(p.counts))) for p in group) for group in (train, parts)
        )
        texts = [p.text for p in parts]
        key = cache_key("compressed", *(p.stream.key for p in parts), *(p.stream.bytes for p in parts))
        compressed = cached(self.cache / f"compressed-{key}", lambda _: compressed_bits(texts))
        bits = {"unigram": unigram_bits(np.asarray(fitted), np.asarray(seen)), **compressed}
        return {name: value / split.bytes for name, value in bits.items()}

    def _parts(self, name: str, split: str) -> dict[str, _Part]:
        """The parts of one source: the split itself, and ``valid`` where training documents are held out."""
        keep = {split: split != "train"}
        if split == "train" and self.plan.hold:
            keep["valid"] = True
        prefix = tokenized_prefix(name, self.plan.base)
        if prefix is not None:
            return self._foreign(name, prefix, keep)
        source = open_source(name, self.config, self.plan.base)
        hold = self.plan.hold if len(keep) > 1 else 0.0
        key = cache_key(
            source.fingerprint(), self.tokenizer.fingerprint, hold, self.config.max_documents, keep
        )
        folder = self.cache / f"tokens-{key}"

        def build(folder: Path) -> dict[str, Any]:
            self.notify(f"tokenizing {name} into {self.cache}")
            return write_parts(folder, source, self.tokenizer, self.config, keep)

        meta = cached(folder, build)
        return {part: self._open(name, folder, part, meta[part]) for part in keep}

    def _foreign(self, name: str, prefix: Path, keep: dict[str, bool]) -> dict[str, _Part]:
        file = open_tokens(prefix)
        most = min(file.documents, self.config.max_documents or file.documents)
        cut = most - round(most * self.plan.hold) if len(keep) > 1 else most
        spans = ((0, cut), (cut, most))  # held-out documents are the last ones, as with Megatron's --split
        ranges = {part: (*span, text) for (part, text), span in zip(keep.items(), spans, strict=False)}
        stats = [Path(f"{prefix}{end}").stat() for end in (".idx", ".bin")]
        state = [(s.st_size, s.st_mtime_ns) for s in stats]
        key = cache_key(prefix.absolute(), state, ranges, self.tokenizer.fingerprint)
        folder = self.cache / f"scan-{key}"

        def build(folder: Path) -> dict[str, Any]:
            self.notify(f"checking the tokens of {prefix}")
            check_pointers(file)
            return write_foreign(folder, file, self.tokenizer, self.limit, ranges)

        meta = cached(folder, build)
        for part in keep:
            check_id(prefix, max(0, len(meta[part]["counts"]) - 1), self.limit)
        return {part: self._open(name, folder, part, meta[part], prefix) for part in keep}

    def _open(
        self, name: str, folder: Path, part: str, meta: dict[str, Any], foreign: Path | None = None
    ) -> _Part:
        file = open_tokens(foreign or folder / part)
        if foreign:
            file = file.part(*meta["range"])
        stream = Stream(
            name=name,
            key=meta["digest"],
            data=file.tokens,
            bounds=file.bounds,
            start_token=self.tokenizer.bos_id,
            lead=int(meta["bos_led"] and foreign is not None),
            bytes=meta["bytes"],
            longest=meta["longest"],
            skipped=meta["skipped"],
        )
        return _Part(stream, np.array(meta["counts"], np.int64), folder / f"{part}.txt")


def _tokenizer(config: DataConfig, plan: Plan, cache: Path, notify: Callable[[str], None]) -> Tokenizer:
    """The tokenizer named, or one trained on the training documents and kept in the cache."""
    if config.tokenizer.path:
        return load_tokenizer(config.tokenizer)
    recipe = plan.splits["train"]
    sources = [
        open_source(n, config, plan.base) for n in recipe.names if tokenized_prefix(n, plan.base) is None
    ]
    if not sources:
        raise DataError(
            "all training sources are tokenized; set data.tokenizer.path to the tokenizer that made them"
        )
    prints = [source.fingerprint() for source in sources]
    folder = cache / f"tokenizer-{cache_key(prints, config.tokenizer, plan.hold, config.max_documents)}"

    def build(folder: Path) -> dict[str, Any]:
        notify(f"training a tokenizer of {config.tokenizer.vocab_size} tokens")
        train_tokenizer(_training_texts(sources, config, plan), config.tokenizer).save(folder)
        return {}

    cached(folder, build)
    return load_tokenizer(replace(config.tokenizer, path=str(folder)))


def _training_texts(sources: list[Source], config: DataConfig, plan: Plan) -> Iterator[str]:
    """Training documents, an equal part of ``training_bytes`` from each source."""
    for source in sources:
        left = config.tokenizer.training_bytes // len(sources)
        for held_out, entry in assign(read_documents(source, config), plan.hold):
            if not held_out and isinstance(entry, Document):
                yield entry.text
                left -= len(entry.text.encode("utf-8"))
            if left <= 0:
                break
