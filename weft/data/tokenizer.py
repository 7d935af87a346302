"""Tokenizers: any ``tokenizer.json``, or a byte-level BPE trained on the corpus."""

import json
import shutil
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from weft.config.errors import DataError
from weft.spec.data import TokenizerConfig

END = "<|endoftext|>"
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_CARRIED = (_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model")
_USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
_USUAL_EOS = ("</s>", "<eos>", "<|end_of_text|>", END, "<|eot_id|>", "<|im_end|>", "[EOS]")


class Tokenizer:
    """Text to token ids and back.

    Control tokens that stand in ordinary text are encoded as text, so a document cannot end itself;
    ``special=True`` (prompts, chat templates) gives them their meaning. No tokens are added by themselves.

    ``vocab_size`` is one more than the largest id.

    Args:
        backend: the loaded tokenizer.
        bos, eos: tokens around a document; each falls back on the other.
        origin: where it came from, for messages and for the files ``save`` carries along.

    Raises:
        DataError: a named token is not in the vocabulary, or there is neither bos nor eos.
    """

    def __init__(self, backend: Backend, bos: str, eos: str, origin: Path | None = None) -> None:
        if not bos and not eos:
            raise DataError(
                f"{origin}: names no begin or end token; set data.tokenizer.eos to one of its tokens"
            )
        self.bos, self.eos, self.origin = bos or eos, eos or bos, origin
        self._backend = backend
        backend.no_truncation()  # some published files cut at 512 tokens
        backend.no_padding()
        self.bos_id, self.eos_id = self._id(self.bos), self._id(self.eos)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids."""
        return blake2b(f"{self.bos_id} {self.eos_id} {self.to_json()}".encode(), digest_size=16).hexdigest()

    def check_size(self, limit: int) -> None:
        """Refuse a model whose vocabulary of ``limit`` tokens is smaller.

        Raises:
            DataError: it is.
        """
        if self.vocab_size > limit:
            raise DataError(
                f"{self.origin}: {self.vocab_size} tokens, but the model's vocabulary has {limit}; "
                "raise model.vocab_size or take a smaller tokenizer"
            )

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        self._backend.encode_special_tokens = not special
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, " tokens"], special: bool = False) -> str:
        """The text of ids; control tokens are shown with ``special``."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=not special)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def save(self, folder: Path) -> None:
        """Write what transformers' ``AutoTokenizer`` loads; files that came with the tokenizer go along."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.origin is None:
            (folder / _FILE).write_text(self.to_json(), encoding="utf-8")
        elif self.origin.parent.resolve() != folder.resolve():
            shutil.copyfile(self.origin, folder / _FILE)
            for carried in (self.origin.parent / name for name in _CARRIED):
                if carried.is_file():
                    shutil.copyfile(carried, folder / carried.name)
        file, ends = folder / _CONFIG, {"bos_token": self.bos, "eos_token": self.eos}
        named = _named_tokens(folder)
        if not file.is_file() or not named or any(named.get(key, end) != end for key, end in ends.items()):
            fresh = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else fresh
            file.write_text(json.dumps(old | ends, indent=2) + "\n", encoding="utf-8")

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise DataError(f"{self.origin}: has no token {token!r}; set data.tokenizer.bos and eos")
        return found


def locate(path: str) -> Path:
    """The tokenizer.json a path means.

    Raises:
        DataError: there is none.
    """
    given = Path(path).expanduser()
    found = given / _FILE if given.is_dir() else given
    if not found.is_file():
        raise DataError(f"data.tokenizer.path: {found} does not exist; name a tokenizer.json or its folder")
    return found


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer at ``config.path``; bos and eos from the settings, its own files, or the usual names.

    Raises:
        DataError: no such file, not a tokenizer.json, or no begin and end token.
    """
    file = locate(config.path)
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:
        raise DataError(f"{file}: not a tokenizer.json ({error})") from error
    vocabulary = backend.get_vocab(with_added_tokens=True)
    named = _named_tokens(file.parent)
    bos = config.bos or named.get("bos_token") or next((t for t in _USUAL_BOS if t in vocabulary), "")
    eos = config.eos or named.get("eos_token") or next((t for t in _USUAL_EOS if t in vocabulary), "")
    return Tokenizer(backend, bos, eos, file)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A byte-level BPE of up to ``config.vocab_size`` tokens: same for the same texts, lossless on any."""
    backend = Backend(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteDecoder()
    names = list(dict.fromkeys(name for name in (config.bos, config.eos) if name)) or [END]
    trainer = BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[AddedToken(name, special=True) for name in names],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, config.bos, config.eos or (END if not config.bos else ""))


def _named_tokens(folder: Path) -> dict[str, str]:
    """bos_token and eos_token of the files beside a tokenizer.json, written as text or as objects."""
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        if (folder / name).is_file():
            try:
                entries = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{folder / name}: not JSON ({error})") from error
            for key in ("bos_token", "eos_token"):
                value = entries.get(key)
                text = value.get("content") if isinstance(value, dict) else value
                if text:
                    named[key] = text
    return named
