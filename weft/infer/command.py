"""``weft generate``: text from a checkpoint."""

import json
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
    """One prompt and what the model wrote after it; no texts without a tokenizer."""

    prompt: str | None
    tokens: list[int]
    text: str | None


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
    if not sampling.stop_tokens:
        sampling = replace(sampling, stop_tokens=_ends(ckpt, tokenizer))
    rows = generate(model, ids, sampling, tokenizer.decode if tokenizer else None)
    if tokenizer is None:
        return [Continuation(None, row, None) for row in rows]
    names = [*prompts, *(tokenizer.decode(row) for row in token_ids)]
    texts = [cut(tokenizer.decode(row), sampling.stop) for row in rows]
    return [Continuation(*parts) for parts in zip(names, rows, texts, strict=True)]


def _ends(ckpt: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's own, and those an import's generation settings name."""
    found = {tokenizer.eos_id} if tokenizer else set()
    for name in ("generation_config.json", "config.json"):
        file = run_of(ckpt) / "hf" / name
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        found |= set(named if isinstance(named, list) else [named] if isinstance(named, int) else [])
    return tuple(sorted(found))
