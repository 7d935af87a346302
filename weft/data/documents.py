"""Documents of tokens and items: written once from samples, then read without decoding anything.

A folder holds ``NAME.bin/.idx`` (tokens, an end token last), ``NAME.mask`` (a byte per token: whether it
counts as a target), ``NAME.items`` (a line of JSON for each document) and ``NAME.lines`` (where each begins).
"""

import json
from array import array
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from weft.data.indexed import TokenFile, TokenWriter, open_tokens, token_dtype
from weft.data.media.blob import Fault
from weft.data.media.items import READERS, measure
from weft.data.messages import END, START, Reference, Span, Text, parse, render
from weft.data.samples import Sample
from weft.data.tokenizer import Tokenizer
from weft.plan.items import Item
from weft.spec.data import DataConfig
from weft.spec.encoder import EncoderConfig


class Found(NamedTuple):
    """An item of a document; its rows take the stored tokens from ``start`` on."""

    item: Item
    start: int


@dataclass(frozen=True)
class Document:
    """One sample as tokens; the end token is the last, and none of ``counted`` is a placeholder."""

    tokens: list[int]
    counted: list[bool]
    items: list[Found]


@dataclass(frozen=True)
class Documents:
    """The documents of one split, memory mapped.

    ``key`` names tokens, targets and sizes of items. ``skipped`` counts the samples left out, by reason.
    """

    prefix: Path
    key: str
    targets: int
    longest: int
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self._file.documents

    @cached_property
    def _file(self) -> TokenFile:
        return open_tokens(self.prefix)

    @cached_property
    def _mask(self) -> np.ndarray:
        return self._mapped("mask", np.bool_)

    @cached_property
    def _lines(self) -> np.ndarray:
        return self._mapped("lines", np.int64)

    def _mapped(self, end: str, kind: type) -> np.ndarray:
        path = Path(f"{self.prefix}.{end}")
        return np.memmap(path, kind, mode="r") if path.stat().st_size else np.zeros(0, kind)

    @property
    def lengths(self) -> Int32[np.ndarray, " documents"]:
        """Tokens of each document."""
        return np.asarray(self._file.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._file.tokens)

    def stored(self, document: int) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Tokens of a document, and which of them count."""
        span = slice(self._file.bounds[document], self._file.bounds[document + 1])
        return self._file.tokens[span].astype(np.int64), np.asarray(self._mask[span])

    def items(self, document: int) -> list[Found]:
        """Items of a document."""
        first, last = (int(n) for n in self._lines[document : document + 2])
        if last - first < len(b"[]\n") + 1:
            return []
        with Path(f"{self.prefix}.items").open("rb") as stream:
            stream.seek(first)
            rows = json.loads(stream.read(last - first))
        return [
            Found(Item(name, tuple(map(tuple, sizes)), count, tuple(ref)), start)
            for name, sizes, count, ref, start in rows
        ]


class Writer:
    """One split being written into a folder; ``files`` closes it. Call ``close`` when it is whole."""

    def __init__(self, prefix: Path, vocab_size: int, files: ExitStack) -> None:
        self.skipped = Counter[str]()
        self._tokens = files.enter_context(TokenWriter(prefix, token_dtype(vocab_size)))
        self._mask = files.enter_context(Path(f"{prefix}.mask").open("wb"))  # noqa: SIM115
        self._items = files.enter_context(Path(f"{prefix}.items").open("wb"))  # noqa: SIM115
        self._prefix, self._lines = prefix, array("q", [0])
        self._digest = blake2b(digest_size=16)
        self._targets = self._longest = 0

    def add(self, document: Document) -> None:
        """Append a document."""
        self._tokens.add(document.tokens)
        mask = bytes(document.counted)
        self._mask.write(mask)
        rows = [[*found.item, found.start] for found in document.items]
        self._lines.append(self._lines[-1] + self._items.write(json.dumps(rows).encode() + b"\n"))
        told = [[f.item.encoder, f.item.sizes, f.item.rows, f.start] for f in document.items]
        self._digest.update(np.asarray(document.tokens, "<i8").tobytes() + mask + repr(told).encode())
        self._targets += sum(document.counted)
        self._longest = max(self._longest, len(document.tokens))

    def close(self) -> dict[str, Any]:
        """What ``Documents`` wants to know."""
        Path(f"{self._prefix}.lines").write_bytes(self._lines.tobytes())
        return {
            "key": self._digest.hexdigest(),
            "targets": self._targets,
            "longest": self._longest,
            "skipped": dict(self.skipped),
        }


class Reader:
    """Samples to documents.

    Args:
        config: templates, limits.
        encoders: who reads the items.
        tokenizer: of the texts.
    """

    def __init__(
        self, config: DataConfig, encoders: Mapping[str, EncoderConfig], tokenizer: Tokenizer
    ) -> None:
        self._config, self._encoders, self._tokenizer = config, encoders, tokenizer
        self._reserved = reserved(config, encoders, tokenizer)
        self._controls = {text: tokenizer.encode(text, special=True) for text in (START, END)}

    def read(self, sample: Sample) -> Document:
        """The tokens of a sample, with a placeholder for each row of its items; these are measured.

        Raises:
            Fault: it cannot be used.
            DataError: a package is missing.
        """
        spans, answered = spans_of(sample.row, self._config)
        media = sum(isinstance(span, Reference) for span in spans)
        if media > (most := self._config.media.max_items):
            fix = "split it or raise data.media.max_items"
            raise Fault("too many items", f"{media} pictures, videos and sounds; the limit is {most}: {fix}")
        texts = [span for span in spans if isinstance(span, Text) and not span.control]
        ids = iter(self._encoded([span.text for span in texts]))
        document = Document([], [], [])
        for span in spans:
            if isinstance(span, Reference):
                self._place(document, sample, span)
                continue
            tokens = self._controls[span.text] if span.control else next(ids)
            document.tokens.extend(tokens)
            document.counted.extend([self._counts(span)] * len(tokens))
        document.tokens.append(self._tokenizer.eos_id)
        document.counted.append(answered or self._config.targets == "all")
        if not any(document.counted):
            fix = "it has no assistant's text: add an answer, or set data.targets=all"
            raise Fault("no target", f"no token of it counts in the loss; {fix}")
        return document

    def _counts(self, span: Text) -> bool:
        return span.counted or self._config.targets == "all"

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            found = next((word for word in self._reserved if word in text), None)
            if found is not None:
                fix = "take it out of the text, or name the media as a part of its own"
                raise Fault("control token in text", f"the text holds {found!r}, which has a meaning: {fix}")
            _check_surrogates(text)
        return self._tokenizer.encode_batch(texts)

    def _place(self, document: Document, sample: Sample, reference: Reference) -> None:
        name = self._encoder(reference)
        encoder = self._encoders[name]
        blobs = tuple(chain.from_iterable(sample.find(each) for each in reference.names))
        if len(blobs) != 1 and reference.kind != "video":
            raise Fault("wrong messages", f"{reference.names[0]} is a folder; a {reference.kind} is one file")
        item = measure(name, encoder, reference.kind, blobs, sample.place, self._config.media)
        before = [encoder.start_token] if encoder.start_token >= 0 else []
        after = [encoder.end_token] if encoder.end_token >= 0 else []
        document.items.append(Found(item, len(document.tokens) + len(before)))
        tokens = [*before, *[encoder.token] * item.rows, *after]
        document.tokens.extend(tokens)
        document.counted.extend([False] * len(tokens))

    def _encoder(self, reference: Reference) -> str:
        kind = READERS[reference.kind]
        fit = [name for name, encoder in self._encoders.items() if isinstance(encoder, kind)]
        if reference.encoder and reference.encoder not in fit:
            have = ", ".join(fit) or "none"
            detail = f"names the encoder {reference.encoder!r}, but those for a {reference.kind} are: {have}"
            raise Fault("no encoder", detail)
        if not fit:
            have = ", ".join(self._encoders) or "none"
            detail = f"it has a {reference.kind}, but no encoder reads one (the run has: {have})"
            raise Fault("no encoder", f"{detail}; add one under `encoders`, or leave it out")
        return reference.encoder or fit[0]


def spans_of(row: dict[str, Any], config: DataConfig) -> tuple[list[Span], bool]:
    """What a row says, in order, and whether its end is a target.

    It has messages, which become text by the template, or one text, all of which counts.

    Raises:
        Fault: it has neither.
    """
    if "messages" in row:
        turns = parse(row["messages"])
        return list(render(turns, config.template)), turns[-1].role == "assistant"
    text = row.get(config.text_field)
    if not isinstance(text, str):
        detail = f"no `messages` and no text {config.text_field!r}, but {', '.join(sorted(map(str, row)))}"
        raise Fault("wrong messages", f"{detail}; set data.text_field or write messages")
    return [Text(text, counted=True)], True


def reserved(
    config: DataConfig, encoders: Mapping[str, EncoderConfig], tokenizer: Tokenizer
) -> tuple[str, ...]:
    """Strings that have a meaning of their own and may not stand in texts."""
    added = {entry["id"]: entry["content"] for entry in json.loads(tokenizer.to_json())["added_tokens"]}
    tokens = (t for e in encoders.values() for t in (e.token, e.start_token, e.end_token))
    words = [added[token] for token in tokens if token in added]
    return tuple(dict.fromkeys([*words, *((START, END) if config.template == "chatml" else ())]))


def _check_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"holds half of a surrogate pair at character {error.start}, which is no text"
        raise Fault("not UTF-8", detail) from error
