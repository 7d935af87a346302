"""Parts of a source (all of it, or its training and validation documents), tokenized into a cache folder."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from weft.config.errors import DataError
from weft.data.indexed import TokenFile, TokenWriter, open_tokens, scan, token_dtype
from weft.data.sources import Document, Skipped, Source
from weft.data.tokenizer import Tokenizer
from weft.spec.data import DataConfig

_BATCH = 1 << 20  # characters tokenized at a time
_PIECE = 1 << 22  # characters; longer documents are tokenized in pieces cut at line ends


def read_documents(source: Source, config: DataConfig) -> Iterator[Document | Skipped]:
    """The documents of a source that hold text, at most ``config.max_documents``.

    Raises:
        DataError: see the source; also for text that has no UTF-8 form.
    """
    for entry in islice(source.documents(), config.max_documents or None):
        if isinstance(entry, Document) and not entry.text:
            yield Skipped(entry.id, "empty")
        elif isinstance(entry, Document):
            yield _checked(entry, source.name, config)
        else:
            yield entry


def _checked(document: Document, source: str, config: DataConfig) -> Document | Skipped:
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        if config.encoding_errors == "skip":
            return Skipped(document.id, "not UTF-8")
        raise DataError(
            f"{source}: {document.id} holds half of a surrogate pair at character {error.start}, which is no "
            "text; mend it or set data.encoding_errors=skip"
        ) from error
    return document


def assign(entries: Iterable[Document | Skipped], hold: float) -> Iterator[tuple[bool, Document | Skipped]]:
    """(held out, entry): the share ``hold`` of documents is held out, chosen by a hash of the id.

    Of a source of one document (one text file) the last lines are held out.
    """
    stream = iter(entries)
    head = list(islice(stream, 2))
    if hold and len(head) == 1 and isinstance(head[0], Document):
        only, cut = head[0], int(len(head[0].text) * (1 - hold))
        cut = only.text.rfind("\n", 0, cut) + 1 or cut
        yield False, Document(f"{only.id}#train", only.text[:cut])
        yield True, Document(f"{only.id}#valid", only.text[cut:])
        return
    for entry in chain(head, stream):
        draw = int.from_bytes(blake2b(entry.id.encode(), digest_size=8).digest(), "big")
        yield draw < hold * 2**64, entry


class _PartWriter:
    """One part being written: tokens, and for validation its text. ``files`` closes both."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, keep_text: bool, files: ExitStack) -> None:
        self.prefix, self.bytes, self.skipped = prefix, 0, Counter[str]()
        self._tokenizer = tokenizer
        self._tokens = files.enter_context(TokenWriter(prefix, token_dtype(tokenizer.vocab_size)))
        self._text: IO[bytes] | None = None
        if keep_text:
            self._text = files.enter_context(Path(f"{prefix}.txt").open("wb"))  # noqa: SIM115
        self._waiting: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        encoded = text.encode("utf-8")
        self.bytes += len(encoded)
        if self._text:
            self._text.write(encoded)
        self._waiting.append(text)
        self._size += len(text)
        if self._size > _BATCH:
            self.flush()

    def flush(self) -> None:
        pieces = [_pieces(text) for text in self._waiting]
        ids = iter(self._tokenizer.encode_batch([piece for text in pieces for piece in text]))
        for text in pieces:
            self._tokens.add([*chain.from_iterable(islice(ids, len(text))), self._tokenizer.eos_id])
        self._waiting, self._size = [], 0


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def write_parts(
    folder: Path, source: Source, tokenizer: Tokenizer, config: DataConfig, keep: dict[str, bool]
) -> dict[str, Any]:
    """Tokenize a source into ``folder``: one ``.bin/.idx`` pair for each part; gives what is known of each.

    ``keep`` names the parts, the second for held-out documents; true keeps the text as well. ``bytes`` is
    0 where the text is not known.

    Raises:
        DataError: a document cannot be read, see ``read_documents``.
    """
    hold = config.valid_fraction if len(keep) > 1 else 0.0
    with ExitStack() as files:
        writers = [_PartWriter(folder / name, tokenizer, text, files) for name, text in keep.items()]
        for held_out, entry in assign(read_documents(source, config), hold):
            if isinstance(entry, Skipped):
                writers[held_out].skipped[entry.reason] += 1
            else:
                writers[held_out].add(entry.text)
        for writer in writers:
            writer.flush()
    meta = {}
    for name, writer in zip(keep, writers, strict=True):
        found = scan(open_tokens(writer.prefix), tokenizer.bos_id, tokenizer.vocab_size)
        meta[name] = asdict(found) | {"bytes": writer.bytes, "skipped": writer.skipped}
    return meta


def write_foreign(
    folder: Path, file: TokenFile, tokenizer: Tokenizer, limit: int, parts: dict[str, tuple[int, int, bool]]
) -> dict[str, Any]:
    """Scan a tokenized file part by part; ``parts[name]`` is (first document, end, keep its text)."""
    meta = {}
    for name, (first, last, keep_text) in parts.items():
        part = file.part(first, last)
        found, size = scan(part, tokenizer.bos_id, limit), 0
        if keep_text:
            with (folder / f"{name}.txt").open("wb") as stream:
                for document in range(part.documents):
                    ids = part.tokens[part.bounds[document] : part.bounds[document + 1]]
                    size += stream.write(tokenizer.decode(ids.tolist()).encode("utf-8"))
        meta[name] = asdict(found) | {"bytes": size, "skipped": {}, "range": [first, last]}
    return meta
