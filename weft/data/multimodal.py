"""From a data configuration and encoders to splits of packed documents, and what encoders read of them."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from weft.config.errors import DataError, Problem
from weft.data.blend import SPLITS, plan_splits
from weft.data.cache import cache_key, cached
from weft.data.digits import MADE, require, write_digits
from weft.data.documents import Document, Documents, Reader, Writer, spans_of
from weft.data.media.blob import Fault
from weft.data.media.items import Media
from weft.data.messages import Text
from weft.data.packed import PackedSplit
from weft.data.samples import Broken, Sample, Samples, open_samples
from weft.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from weft.spec.data import DataConfig
from weft.spec.encoder import EncoderConfig

_FORM = 1  # of the index; a change makes it anew


@dataclass(frozen=True)
class Multimodal:
    """Packed splits (``train``, and ``valid`` and ``test`` where there are), tokenizer, and media.

    Samples left out are counted in ``splits[name].skipped``.
    """

    tokenizer: Tokenizer
    splits: dict[str, PackedSplit]
    media: Media


def is_multimodal(config: DataConfig, encoders: Mapping[str, EncoderConfig]) -> bool:
    """Whether the data is read as samples: the run has encoders, or the source can be nothing else."""
    if encoders:
        return config.source != "mock" or bool(config.blend)
    if config.blend:
        return False
    if config.source in MADE or config.source.endswith(".tar"):
        return True
    path = Path(config.source).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as stream:
        return b'"messages"' in stream.readline(1 << 20)


def check_multimodal(config: DataConfig, vocab_size: int) -> Iterator[Problem]:
    """Every file and package that is missing, without reading samples."""
    if config.tokenizer.path:
        yield from _try("tokenizer.path", lambda: load_tokenizer(config.tokenizer).check_size(vocab_size))
    if not config.blend and config.source in MADE:
        yield from _try("source", require)
        return

    def look() -> None:
        plan = _plan(config, Path(), lambda line: None)
        for split in plan.names:
            plan.sources(split, config)

    yield from _try("blend" if config.blend else "source", look)


def _try(path: str, look: Callable[[], object]) -> Iterator[Problem]:
    try:
        look()
    except DataError as error:
        yield Problem(path, str(error))


def open_multimodal(
    config: DataConfig,
    encoders: Mapping[str, EncoderConfig],
    vocab_size: int,
    cache: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> Multimodal:
    """Index what is not yet in ``cache`` and open all splits.

    The index holds tokens, targets, and sizes and places of items; each item is decoded once for it and
    nothing of that is kept.

    Args:
        config: what to read.
        encoders: who reads the items, by name.
        vocab_size: of the model; larger token ids are refused.
        cache: directory of indices; may be shared by processes at the same time.
        notify: receives a line before each piece of slow work.

    Raises:
        DataError: a source, a sample or the tokenizer cannot be used; the message names file and place.
    """
    plan = _plan(config, cache, notify)
    tokenizer = _tokenizer(config, plan, cache, notify)
    tokenizer.check_size(vocab_size)
    _check_tokens(encoders, tokenizer, vocab_size)
    index = _Index(config, plan, Reader(config, encoders, tokenizer), vocab_size, cache, notify)
    identity = (tokenizer.fingerprint, vocab_size, *sorted((name, repr(e)) for name, e in encoders.items()))
    found: dict[str, list[Documents]] = {}
    for split, names in plan.names.items():
        for name in names:
            for part, documents in index.open(name, split, identity).items():
                found.setdefault(part, []).append(documents)
    splits = {
        name: PackedSplit(name, tuple(found[name]), tokenizer.bos_id) for name in SPLITS if name in found
    }
    for split in splits.values():
        _check_split(split, config)
    return Multimodal(tokenizer, splits, Media(encoders, config.media))


@dataclass(frozen=True)
class _Plan:
    """Names of the sources of each split; ``hold``: the share of training samples that become ``valid``."""

    names: dict[str, tuple[str, ...]]
    hold: float
    base: Path | None

    def sources(self, split: str, config: DataConfig) -> list[Samples]:
        return [open_samples(name, config, self.base) for name in self.names[split]]


def _plan(config: DataConfig, cache: Path, notify: Callable[[str], None]) -> _Plan:
    if not config.blend and config.source in MADE:
        made = write_digits(config.source, cache, notify)
        return _Plan({split: (str(path),) for split, path in made.items()}, 0.0, None)
    plan = plan_splits(config)
    for split, recipe in plan.splits.items():
        if recipe.weights:
            fix = "leave the weights out, or list a path several times"
            raise DataError(
                f"{config.blend}: {split!r} has weights, but samples are not blended by them: {fix}"
            )
    return _Plan({split: recipe.names for split, recipe in plan.splits.items()}, plan.hold, plan.base)


@dataclass(frozen=True)
class _Index:
    config: DataConfig
    plan: _Plan
    reader: Reader
    vocab_size: int
    cache: Path
    notify: Callable[[str], None]

    def open(self, name: str, split: str, identity: tuple[object, ...]) -> dict[str, Documents]:
        """The parts of one source: the split itself, and ``valid`` where training samples are held out."""
        source = open_samples(name, self.config, self.plan.base)
        keep = [split, "valid"] if split == "train" and self.plan.hold else [split]
        settings = replace(self.config, cache="", lookahead=1)
        key = cache_key(_FORM, source.fingerprint(), keep, settings, *identity)
        folder = self.cache / f"samples-{key}"

        def build(folder: Path) -> dict[str, Any]:
            self.notify(f"indexing {name} into {self.cache}")
            return self._write(folder, source, keep)

        meta = cached(folder, build)
        return {part: Documents(folder / part, **meta[part]) for part in keep}

    def _write(self, folder: Path, source: Samples, keep: list[str]) -> dict[str, Any]:
        with ExitStack() as files:
            writers = [Writer(folder / part, self.vocab_size, files) for part in keep]
            for entry in islice(source.rows(), self.config.max_documents or None):
                writer = writers[-1 if _held_out(entry.id, self.plan.hold) else 0]
                made = self._document(entry)
                if isinstance(made, Fault):
                    writer.skipped[made.reason] += 1
                else:
                    writer.add(made)
            return {part: writer.close() for part, writer in zip(keep, writers, strict=True)}

    def _document(self, entry: Sample | Broken) -> Document | Fault:
        """A sample as tokens, or why it is left out."""
        try:
            if isinstance(entry, Broken):
                raise entry.fault
            document = self.reader.read(entry)
        except Fault as fault:
            if self.config.media_errors == "skip":
                return fault
            fix = "mend it, or leave all such out with data.media_errors=skip"
            raise DataError(f"{entry.place}: {fault.reason}: {fault}; {fix}") from fault
        most = self.config.seq_length
        if len(document.tokens) <= most:
            return document
        fault = Fault("too long", f"{len(document.tokens)} tokens; the limit is {most}")
        if self.config.overlong == "skip":
            return fault
        fix = "raise data.seq_length, or leave such samples out with data.overlong=skip"
        raise DataError(f"{entry.place}: {fault.reason}: {fault}; {fix}")


def _held_out(name: str, share: float) -> bool:
    """Whether the sample of this id belongs to the share that is held out."""
    draw = blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(draw, "big") < share * 2**64


def _tokenizer(config: DataConfig, plan: _Plan, cache: Path, notify: Callable[[str], None]) -> Tokenizer:
    """The tokenizer named, or one trained on the training samples and kept in the cache."""
    if config.tokenizer.path:
        return load_tokenizer(config.tokenizer)
    sources = plan.sources("train", config)
    prints = [source.fingerprint() for source in sources]
    key = cache_key(
        prints, config.tokenizer, config.template, config.text_field, plan.hold, config.max_documents
    )
    folder = cache / f"tokenizer-{key}"

    def build(folder: Path) -> dict[str, Any]:
        notify(f"training a tokenizer of {config.tokenizer.vocab_size} tokens")
        train_tokenizer(_texts(sources, config, plan.hold), config.tokenizer).save(folder)
        return {}

    cached(folder, build)
    return load_tokenizer(replace(config.tokenizer, path=str(folder)))


def _texts(sources: list[Samples], config: DataConfig, hold: float) -> Iterator[str]:
    """Texts of training samples, up to ``training_bytes``; what cannot be read is left to the index."""
    left = config.tokenizer.training_bytes
    for source in sources:
        for entry in islice(source.rows(), config.max_documents or None):
            if left <= 0:
                return
            if isinstance(entry, Broken) or _held_out(entry.id, hold):
                continue
            with suppress(Fault):
                spans, _ = spans_of(entry.row, config)
                texts = [s.text for s in spans if isinstance(s, Text) and _is_text(s.text)]
                left -= sum(map(len, texts))
                yield from texts


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_tokens(encoders: Mapping[str, EncoderConfig], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse tokens of encoders that texts have too, or that the model lacks."""
    special = {entry["id"] for entry in json.loads(tokenizer.to_json())["added_tokens"]}
    for name, encoder in encoders.items():
        for field in ("token", "start_token", "end_token"):
            token = int(getattr(encoder, field))
            if token >= vocab_size:
                limit = f"the model's vocabulary has {vocab_size}; raise model.vocab_size"
                raise DataError(f"encoders.{name}.{field} = {token}, but {limit}")
            if 0 <= token < tokenizer.vocab_size and (token not in special or token == tokenizer.eos_id):
                means = tokenizer.decode([token], special=True)
                fix = f"take a control token of the tokenizer, or one from {tokenizer.vocab_size} on"
                raise DataError(f"encoders.{name}.{field} = {token} is {means!r} in texts; {fix}")


def _check_split(split: PackedSplit, config: DataConfig) -> None:
    if split.documents:
        return
    left = ", ".join(f"{count} left out: {reason}" for reason, count in split.skipped.items())
    fix = "mend the data" if left else f"raise data.valid_fraction = {config.valid_fraction}, or name a blend"
    raise DataError(f"no sample in the split {split.name!r} ({left or 'none fell into it'}); {fix}")
