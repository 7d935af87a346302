"""``weft generate``: text from a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weft.checkpoint.model import load_model, run_of
from weft.config.errors import RunError
from weft.data.tokenizer import Tokenizer, load_tokenizer
from weft.infer.generate import Sampling, cut, generate
from weft.spec.data import TokenizerConfig


@dataclass(frozen=True)
class Continuation:
    """One prompt and what the model wrote after it."""

    prompt: str
    tokens: list[int]
    text: str


def tokenizer_of(ckpt: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint: the run's own, or the one an import carried."""
    for folder in (run_of(ckpt) / "tokenizer", run_of(ckpt) / "hf"):
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(TokenizerConfig(path=str(folder)))
    return None


def generate_text(
    ckpt: Path, prompts: Sequence[str], token_ids: Sequence[Sequence[int]], sampling: Sampling
) -> list[Continuation]:
    """Continue text prompts (with the checkpoint's tokenizer) and token-id prompts.

    Raises:
        RunError: no prompt, or a text prompt without a tokenizer beside the checkpoint.
    """
    model, _ = load_model(ckpt)
    tokenizer = tokenizer_of(ckpt)
    if prompts and tokenizer is None:
        raise RunError(f"{ckpt} has no tokenizer beside it; give --token-ids instead of --prompt")
    ids = (
        [[tokenizer.bos_id, *tokenizer.encode(prompt, special=True)] for prompt in prompts]
        if tokenizer
        else []
    )
    ids += [list(row) for row in token_ids]
    if not ids:
        raise RunError("nothing to continue; give --prompt TEXT or --token-ids 1,2,3")
    if tokenizer and not sampling.stop_tokens:
        sampling = replace(sampling, stop_tokens=(tokenizer.eos_id,))
    rows = generate(model, ids, sampling, tokenizer.decode if tokenizer else None)
    names = [*prompts, *(",".join(map(str, row)) for row in token_ids)]
    texts = [cut(tokenizer.decode(row), sampling.stop) if tokenizer else "" for row in rows]
    return [Continuation(*parts) for parts in zip(names, rows, texts, strict=True)]
