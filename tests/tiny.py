"""Tiny hybrid models and random batches for tests."""

from dataclasses import replace

import numpy as np
import torch

from weft.build.model import assemble
from weft.data.batch import Batch
from weft.models.hybrid import HybridLM
from weft.spec.hybrid import HybridConfig

CONFIG = HybridConfig(
    pattern="ME*-/*E",
    vocab_size=61,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=20,
    routed_scaling_factor=2.5,
    router_aux_loss_coef=1e-2,
    router_z_loss_coef=1e-3,
    mtp_num_depths=2,
    initializer_range=0.3,
)


def make(precision: str = "fp64", **changes: object) -> HybridLM:
    """A tiny model with every parameter and buffer drawn at random, norms and biases too."""
    model = assemble(replace(CONFIG, **changes), precision, torch.device("cpu"), seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor += (0.2 * noise).to(tensor.dtype)
    return model


def batch(lengths: tuple[int, ...], seed: int = 0, depths: int = 2, vocab: int = 61) -> Batch:
    """Random documents of these lengths, packed."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab, n) for n in lengths]
    future = np.full((depths + 1, sum(lengths)), -1, dtype=np.int64)
    start = 0
    for document in documents:
        for k in range(1, min(depths + 1, len(document) - 1) + 1):
            future[k - 1, start : start + len(document) - k] = document[k:]
        start += len(document)
    tokens = np.concatenate(documents).astype(np.int64)
    return Batch(tokens=tokens, future=future, mask=future >= 0, lengths=lengths, samples=(seed,))


def split(packed: Batch) -> list[Batch]:
    """Each document of a packed batch as a batch of its own."""
    parts, start = [], 0
    for length in packed.lengths:
        rows = slice(start, start + length)
        fields = (packed.tokens[rows], packed.future[:, rows], packed.mask[:, rows])
        parts.append(Batch(*fields, lengths=(length,), samples=packed.samples))
        start += length
    return parts
