"""Generation: prefill in chunks, then one token per step for every sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.config.errors import RunError
from weft.infer.cache import first, make_cache
from weft.models.hybrid import HybridLM
from weft.nn.state import Cache
from weft.ops.segments import Segments


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        max_new_tokens: tokens generated per prompt at most.
        temperature: divides logits; 0 takes the most likely token.
        top_p: keep the smallest set of tokens whose probability reaches this (Holtzman et al. 2020).
        seed: each prompt draws from its own generator, so results do not depend on the batch.
        stop_tokens: generation of a sequence ends after one of these.
        stop: strings that end a sequence; the text is cut before them.
        prefill_chunk: prompt tokens per sequence and forward pass.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    prefill_chunk: int = 2048

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.max_new_tokens < 1 or self.prefill_chunk < 1:
            raise RunError("max_new_tokens and prefill_chunk must be at least 1")
        if self.temperature < 0:
            raise RunError(f"temperature {self.temperature} is negative; use 0 for the most likely token")
        if not 0 < self.top_p <= 1:
            raise RunError(f"top_p {self.top_p} is out of range; it must be more than 0 and at most 1")


@torch.inference_mode()
def generate(
    model: HybridLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None = None,
) -> list[list[int]]:
    """Continuations (without their prompts) of token-id prompts of any lengths.

    Args:
        model: the model; its parameters' device and dtype are used.
        prompts: token ids, at least one each.
        sampling: how to choose.
        decode: ids to text; needed for stop strings only.

    Raises:
        RunError: an empty prompt, a token id beyond the vocabulary, stop strings without ``decode``.
    """
    _check(model, prompts, sampling, decode)
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    ordered = [list(prompts[i]) for i in by_length]
    weight = model.embed.weight
    ssm = torch.float64 if weight.dtype == torch.float64 else torch.float32
    places = len(ordered[0]) + sampling.max_new_tokens
    cache = make_cache(model.config, len(ordered), places, weight.dtype, ssm, weight.device)
    logits = _prefill(model, ordered, cache, sampling.prefill_chunk)
    generators = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + i) for i in by_length]
    outputs: list[list[int]] = [[] for _ in ordered]
    running = set(range(len(ordered)))
    ones = Segments((1,) * len(ordered))
    for produced in range(1, sampling.max_new_tokens + 1):
        chosen = choose(logits, sampling, generators)
        ids = chosen.tolist()
        for row in sorted(running):
            outputs[row].append(ids[row])
            if _ended(outputs[row], sampling, decode):
                running.discard(row)
        if not running or produced == sampling.max_new_tokens:
            break
        logits = model.logits(chosen, ones, cache)
    return [outputs[by_length.index(i)] for i in range(len(prompts))]


def _check(
    model: HybridLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None,
) -> None:
    vocab = model.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RunError(f"prompt {number} is empty; give at least one token")
        bad = [token for token in prompt if not 0 <= token < vocab]
        if bad:
            raise RunError(f"prompt {number} has token id {bad[0]}; ids of this model are 0 to {vocab - 1}")
    if sampling.stop and decode is None:
        raise RunError("stop strings need a tokenizer; give stop tokens instead")


def _prefill(
    model: HybridLM, prompts: list[list[int]], cache: Cache, chunk: int
) -> Float[Tensor, "seqs vocab"]:
    """Read prompts (longest first) chunk by chunk; logits after each prompt's last token.

    Sequences still reading are a prefix of the batch, so each round works on views of the cache.
    """
    device = model.embed.weight.device
    last: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, len(prompts[0]), chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts if len(prompt) > start]
        view = first(cache, len(parts))
        segments = Segments(tuple(len(part) for part in parts))
        tokens = torch.tensor([token for part in parts for token in part], device=device)
        hidden = model.extend(tokens, segments, view)
        cache.lengths[: len(parts)] = view.lengths
        for row, end in enumerate(segments.starts):
            if len(prompts[row]) <= start + chunk:
                last[row] = hidden[end + len(parts[row]) - 1]
    return model.head.logits(torch.stack([row for row in last if row is not None]))


def choose(
    logits: Float[Tensor, "seqs vocab"], sampling: Sampling, generators: Sequence[torch.Generator]
) -> Int[Tensor, " seqs"]:
    """One token per sequence."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / sampling.temperature).softmax(-1).cpu()
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        before = ranked.cumsum(-1) - ranked
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked * (before < sampling.top_p))
    rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(rows).to(logits.device)


def _ended(output: list[int], sampling: Sampling, decode: Callable[[list[int]], str] | None) -> bool:
    if output[-1] in sampling.stop_tokens:
        return True
    if not sampling.stop or decode is None:
        return False
    text = decode(output)
    return any(stop in text for stop in sampling.stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.index(s) for s in stop if s in text]
    return text[: min(ends)] if ends else text
