"""Logits, gradients and greedy text of random tiny models, against transformers in fp32."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.parity.pairs import Pair, gather, live_tensors
from tests.tiny import CONFIG
from weft.infer.generate import Sampling, generate
from weft.ops.segments import Segments
from weft.spec.hybrid import HybridConfig

BASE = replace(CONFIG, pattern="ME*-", mtp_num_depths=0)
Make = Callable[[HybridConfig, int], Pair]


def draw(seed: int) -> HybridConfig:
    """A random tiny model of the family."""
    rng = random.Random(seed)
    letters = [*"M*-E", *rng.choices("MM*-E", k=rng.randint(0, 4))]
    rng.shuffle(letters)
    groups, kv, expert_groups = rng.choice([1, 2, 4]), rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    return replace(
        BASE,
        pattern="".join(letters),
        vocab_size=rng.randint(40, 90),
        hidden_size=rng.choice([16, 20, 32]),
        num_attention_heads=kv * rng.choice([1, 2, 4]),
        num_key_value_heads=kv,
        head_dim=rng.choice([4, 8]),
        mamba_num_heads=groups * rng.choice([1, 2, 3]),
        mamba_head_dim=rng.choice([4, 8, 12]),
        ssm_state_size=rng.choice([4, 8, 16]),
        n_groups=groups,
        conv_kernel=rng.choice([2, 3, 4]),
        chunk_size=rng.choice([4, 8, 16, 64]),
        time_step_min=rng.choice([1e-6, 1e-3, 0.05]),
        n_routed_experts=4 * expert_groups,
        num_experts_per_tok=rng.randint(2, 4),
        n_group=expert_groups,
        topk_group=rng.randint(1, expert_groups),
        moe_latent_size=rng.choice([0, 0, 8, 24]),
        norm_topk_prob=rng.choice([True, True, False]),
        routed_scaling_factor=rng.choice([1.0, 2.5, 5.0]),
        layer_norm_epsilon=rng.choice([1e-5, 1e-3]),
    )


CONFIGS = {
    "all kinds, latent": BASE,
    "all kinds, no latent": replace(BASE, moe_latent_size=0),
    **{letter: replace(BASE, pattern=letter) for letter in "M*-E"},
    "E without latent": replace(BASE, pattern="E", moe_latent_size=0),
    **{f"random {seed}": draw(seed) for seed in range(8)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name: str, pair: Make) -> None:
    check_pair(pair(CONFIGS[name], 3))


def check_pair(both: Pair) -> None:
    """Logits, loss and every gradient on three packed documents."""
    compare_pair(both)
    check_gradients(both)


Texts = tuple[torch.Tensor, torch.Tensor, Segments]


def compare_pair(both: Pair) -> Texts:
    """Logits to 1e-4 of their spread, and the loss; both models then hold their gradients."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, both.config.vocab_size, (n,), generator=generator) for n in (1, 37, 21)]
    loss = torch.zeros(())
    reference = []
    for row in rows:
        logits = both.theirs(row[None], use_cache=False).logits[0]
        reference.append(logits.detach())
        loss = loss + F.cross_entropy(logits[:-1], row[1:], reduction="sum")
    loss.backward()
    packed, segments = torch.cat(rows), Segments(tuple(map(len, rows)))
    ours = both.ours.logits(packed, segments).detach()
    theirs = torch.cat(reference)
    assert theirs.std() >= 0.5
    worst = (ours - theirs).abs().max() / theirs.std()
    assert worst <= 1e-4, worst
    future = torch.cat([torch.cat([row[1:], torch.tensor([-1])]) for row in rows])[None]
    losses = both.ours.losses(packed, future, future >= 0, both.ours.context(segments), [1.0])
    losses.lm.backward()
    torch.testing.assert_close(losses.lm, loss, rtol=1e-5, atol=0)
    return packed, future, segments


def check_gradients(both: Pair) -> None:
    """Every parameter: the norm of the difference is at most 1e-4 of the gradient's norm."""
    wanted = gather(both.config, live_tensors(both.theirs, both.mtp, gradients=True))
    for name, parameter in both.ours.named_parameters():
        assert parameter.grad is not None, name
        assert wanted[name].isfinite().all(), name
        error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        assert error <= 1e-4, (name, error)


def test_the_time_step_limit_of_transformers(pair: Make) -> None:
    """What ``as_transformers_runs`` copies; should transformers change, drop that function."""
    both = pair(replace(BASE, pattern="M", time_step_min=0.03), 0)
    assert both.theirs.model.layers[0].mixer.time_step_limit == (0.03, float("inf"))
    assert both.config.time_step_limit == (0.03, float("inf"))


@pytest.mark.parametrize("name", ["all kinds, latent", "all kinds, no latent"])
def test_greedy_text(name: str, pair: Make) -> None:
    """8 prompts x 64 tokens; two rows may part only where transformers' best two are nearly equal."""
    both = pair(replace(CONFIGS[name], time_step_min=1e-6), 11)  # theirs is another one in decoding
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 61, (4, n), generator=generator) for n in (5, 18)]
    rows = [row.tolist() for batch in prompts for row in batch]
    ours = generate(both.ours, rows, Sampling(max_new_tokens=64))
    theirs, gaps = [], []
    for batch in prompts:
        out = both.theirs.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        theirs += out.sequences[:, batch.shape[1] :].tolist()
        best = torch.stack(out.logits, dim=1).topk(2, dim=-1).values
        gaps += (best[..., 0] - best[..., 1]).tolist()
    assert len(ours) == 8
    for mine, their, gap in zip(ours, theirs, gaps, strict=True):
        assert len(mine) == len(their) == 64
        parted = next((i for i in range(64) if mine[i] != their[i]), None)
        assert parted is None or gap[parted] < 1e-4
    assert len({token for row in theirs for token in row}) > 8  # it says more than one word
