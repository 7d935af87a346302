"""``weft compare``: one model in transformers and here, on the same tokens, in fp32."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from weft.build.model import assemble_from
from weft.checkpoint.load import Checkpoint, match, open_checkpoint
from weft.checkpoint.model import model_config
from weft.config.errors import RunError
from weft.data.tokenizer import load_tokenizer
from weft.ops.segments import Segments
from weft.spec.data import TokenizerConfig
from weft.spec.hybrid import HybridConfig

MAX_DIFFERENCE = 1e-4  # of the largest logit difference to the standard deviation of the logits
MAX_KL = 1e-6  # nats, at the worst token
AGREE, DIFFER, NOT_COMPARED = 0, 1, 2


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits lie apart.

    Attributes:
        top1: share of tokens with the same most likely next token.
        cosine: smallest cosine similarity of one token's logits.
        difference: largest absolute difference over the standard deviation of all reference logits.
        kl: largest divergence KL(reference || ours) of one token, in nats.
    """

    top1: float
    cosine: float
    difference: float
    kl: float

    @property
    def agrees(self) -> bool:
        """Whether both are the same model up to fp32 rounding; never for NaN."""
        return self.difference <= MAX_DIFFERENCE and self.kl <= MAX_KL


def measure(reference: Float[Tensor, "tokens vocab"], ours: Float[Tensor, "tokens vocab"]) -> Agreement:
    """Compare logits, in fp64."""
    a, b = reference.double(), ours.double()
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    return Agreement(
        top1=(a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        cosine=torch.cosine_similarity(a, b, dim=-1).min().item(),
        difference=((a - b).abs().max() / a.std()).item(),
        kl=(logp.exp() * (logp - logq)).sum(-1).max().item(),
    )


def compare(hf_dir: Path, ckpt: Path, token_ids: Sequence[Sequence[int]], prompt: Sequence[str]) -> int:
    """Print agreement for every prompt; the exit status: 0 they agree, 1 they differ, 2 not compared.

    Args:
        hf_dir: directory that transformers loads; code in it is never run.
        ckpt: run or step directory.
        token_ids: prompts as token ids.
        prompt: prompts as text, encoded with the tokenizer of ``hf_dir``.

    Raises:
        RunError: a prompt without tokens or with ids beyond the vocabulary, or a directory that transformers
            cannot load.
        CheckpointError: a checkpoint that cannot be read.
    """
    console = Console(highlight=False, soft_wrap=True)
    rows = [list(row) for row in token_ids]
    if prompt:
        tokenizer = load_tokenizer(TokenizerConfig(path=str(hf_dir)))
        rows += [tokenizer.encode(text, special=True) for text in prompt]
    if not hf_dir.is_dir():
        raise RunError(f"{hf_dir}: no such directory; name one that transformers can load")
    checkpoint = open_checkpoint(ckpt)
    _check(rows, model_config(checkpoint).vocab_size)
    try:
        reference = _theirs(hf_dir, rows)
    except ImportError as error:
        console.print(
            f"not compared: transformers cannot be used ({error}); pip install 'weft[hf]'", markup=False
        )
        return NOT_COMPARED
    ours = _ours(checkpoint, rows, console)
    if reference[0].shape != ours[0].shape:
        sizes = " and ".join(str(logits[0].shape[1]) for logits in (reference, ours))
        console.print(f"they differ: vocabularies of {sizes} tokens")
        return DIFFER
    results = [measure(a, b) for a, b in zip(reference, ours, strict=True)]
    for row, result in zip(rows, results, strict=True):
        head = ",".join(map(str, row[:8])) + (",..." if len(row) > 8 else "")
        console.print(f"tokens {head} ({len(row)})", markup=False)
        console.print(f"  top-1 agreement             {result.top1:.2%}")
        console.print(f"  cosine, worst token         {result.cosine:.9f}")
        console.print(f"  maximum difference / std    {result.difference:.3g}  (limit {MAX_DIFFERENCE:g})")
        console.print(f"  KL, worst token             {result.kl:.3g} nats  (limit {MAX_KL:g})")
    agree = all(result.agrees for result in results)
    console.print("they agree" if agree else "they differ")
    return AGREE if agree else DIFFER


@torch.inference_mode()
def _theirs(hf_dir: Path, rows: list[list[int]]) -> list[Tensor]:
    """Logits of transformers' model, which is gone when this returns.

    Raises:
        ImportError: transformers is not installed.
        RunError: it cannot load the directory, or a prompt does not fit.
    """
    transformers: Any = import_module("transformers")  # by name: a type checker would read thousands of files
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{hf_dir}: transformers cannot load it: {error}") from error
    _check(rows, model.config.vocab_size)
    return [model(torch.tensor([row]), use_cache=False).logits[0] for row in rows]


def as_transformers_runs(config: HybridConfig) -> HybridConfig:
    """The model with the time-step limit of transformers 5.23.

    Its ``NemotronHMamba2Mixer`` takes ``(time_step_min, inf)`` where the model's own code takes the config's
    ``time_step_limit``, and only when it reads many tokens at once.
    """
    return replace(config, time_step_limit=(config.time_step_min, math.inf))


@torch.inference_mode()
def _ours(checkpoint: Checkpoint, rows: list[list[int]], console: Console) -> list[Tensor]:
    own = model_config(checkpoint)
    match(checkpoint, own.params(), "model/")
    config = as_transformers_runs(own)
    if "M" in own.pattern and config != own:
        low, high = own.time_step_limit
        console.print(
            f"transformers clamps Mamba-2 time steps to at least {own.time_step_min:g} (this model's limits "
            f"are {low:g} and {high:g}); for the comparison both sides do",
            markup=False,
        )
    cpu = torch.device("cpu")
    model = assemble_from(config, "fp32", cpu, lambda name, box: checkpoint.read(f"model/{name}", box))
    return [model.logits(torch.tensor(row), Segments((len(row),))) for row in rows]


def _check(rows: list[list[int]], vocab: int) -> None:
    for row in rows:
        bad = [token for token in row if not 0 <= token < vocab]
        if not row or bad:
            what = (
                f"token id {bad[0]} is beyond the vocabulary (0 to {vocab - 1})"
                if bad
                else "a prompt is empty"
            )
            raise RunError(f"{what}; give at least one id of this model, such as --token-ids 1,2,3")
