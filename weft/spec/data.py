"""Where tokens come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from weft.config.base import Config, setting
from weft.config.errors import Problem

_PATH = (
    "a text or code file or folder, a .jsonl or .parquet file, a Hugging Face dataset directory, "
    "hf:NAME[:SPLIT[:CONFIG]] (streamed), or a Megatron prefix of .bin/.idx"
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Config):
    """A ``tokenizer.json``, or a byte-level BPE trained on the training split."""

    path: str = setting("", "a tokenizer.json or a directory that holds one; empty trains one on the corpus")
    vocab_size: int = setting(4096, "tokens of a trained tokenizer, special tokens included", ge=257)
    training_bytes: int = setting(16_000_000, "bytes of text a trained tokenizer sees at most", ge=1)
    bos: str = setting("", "token before each document; empty takes the tokenizer's own, else its eos")
    eos: str = setting("", "token after each document; empty takes the tokenizer's own, else its bos")


@dataclass(frozen=True, kw_only=True)
class MediaConfig(Config):
    """Limits on the pictures, videos and sounds of samples, and how they are kept."""

    max_bytes: int = setting(1 << 28, "largest file or archive member, in bytes", ge=1)
    max_pixels: int = setting(50_000_000, "largest picture or frame, in pixels", ge=1)
    max_frames: int = setting(
        128, "most frames of a video that are read; of a longer one, so many evenly spaced ones", ge=1
    )
    max_seconds: float = setting(1200.0, "longest clip of sound, in seconds", gt=0)
    max_items: int = setting(64, "most pictures, videos and sounds of one sample", ge=0)
    outside: bool = setting(False, "read files outside the folder of the .jsonl file that names them")
    cache_bytes: int = setting(1 << 26, "bytes of decoded items that each process keeps at most", ge=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """One corpus or a blend, packed into sequences with document boundaries."""

    source: str = setting(
        "stdlib",
        f"stdlib: the sources of Python's own library; mock: random tokens; or a path: {_PATH}. "
        "Where the run has encoders: digits (handwritten, of scikit-learn); digits_av (seen and spoken); a "
        ".jsonl file with `messages`; or WebDataset shards (.tar, a folder, or a pattern as in "
        "shard-{000..015}.tar). Not read where `blend` is set",
    )
    blend: str = setting(
        "",
        "JSON file {'train': [weight, path, ...], 'valid': [...], 'test': [...]}; weights may be left out "
        "(then each path counts by its tokens); paths as in `source`",
    )
    glob: str = setting("*", "file name pattern inside folders, for example *.py")
    text_field: str = setting("text", "field that holds the text in JSONL, Parquet and datasets rows")
    encoding_errors: Literal["error", "skip"] = setting(
        "error", "what to do with text that is not UTF-8; skipped documents are counted and shown"
    )
    cache: str = setting("", "directory of tokenized corpora; empty is .cache in the run directory's parent")
    seq_length: int = setting(512, "tokens per packed sequence", ge=2)
    valid_fraction: float = setting(
        0.02,
        "share of documents held out by hash where the blend has no valid split; 0 holds out none",
        ge=0,
        lt=1,
    )
    max_documents: int = setting(0, "stop reading a source after this many documents; 0 reads all", ge=0)
    template: Literal["plain", "chatml"] = setting(
        "plain", "how messages become text: plain (turns on lines of their own), or ChatML with roles"
    )
    targets: Literal["answers", "all"] = setting(
        "answers", "which tokens of messages count in the loss: those of the assistant, or all text"
    )
    media_errors: Literal["error", "skip"] = setting(
        "error", "what to do with a sample that cannot be used; skipped ones are counted and shown"
    )
    overlong: Literal["error", "skip"] = setting(
        "error", "what to do with a sample of more than seq_length tokens, which is never cut"
    )
    lookahead: int = setting(256, "samples among which one is chosen to fill a sequence", ge=1)
    mock_tokens: int = setting(262_144, "tokens of the mock source", ge=256)
    tokenizer: TokenizerConfig = setting(TokenizerConfig, "the tokenizer")
    media: MediaConfig = setting(MediaConfig, "limits on what samples hold beside text")

    def check(self) -> Iterator[Problem]:
        """Some source is named."""
        if not self.source and not self.blend:
            yield Problem(
                "source", "no data: name a source (data.source=stdlib) or a blend (data.blend=blend.json)"
            )
