"""Training and decoding speed of the hybrid model against transformers, in one run.

Both models have the committed config below (the proportions of Nemotron 3 Super at width 256), fp32, two
threads, and both profit from an allocator that keeps freed memory (weft.ops.memory). The peer gets its best
flags: sdpa attention, the faster of its eager and grouped_mm experts, the fastest chunk size of 32, 64 and
128, fused AdamW, and its cache. Rounds of the two are interleaved; figures are medians.

    python benchmarks/hybrid_vs_transformers.py            # writes benchmarks/hybrid_vs_transformers.json
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from weft.build.model import assemble
from weft.infer.generate import Sampling, generate
from weft.ops.linear import linear
from weft.ops.memory import keep_freed_memory
from weft.ops.segments import Segments
from weft.parallel.store import Store
from weft.spec.count import count, training_flops_per_token
from weft.spec.hybrid import HybridConfig
from weft.spec.run import OptimizerConfig
from weft.train.environment import environment
from weft.train.flops import measure_peak
from weft.train.optimizer import Optimizer

CONFIG = HybridConfig(
    pattern="ME*-MEM*E-",
    vocab_size=8192,
    hidden_size=256,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=1,
    chunk_size=64,
    intermediate_size=1024,
    n_routed_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=168,
    moe_latent_size=128,
    moe_shared_expert_intermediate_size=336,
    routed_scaling_factor=2.5,
    router_aux_loss_coef=0.0,
    router_bias_update_rate=0.0,
)
TOKENS = 4096  # per training step
PROMPT, NEW = 128, 64


def peer(experts: str, chunk: int) -> NemotronHForCausalLM:
    """transformers' model of the same config."""
    c = CONFIG
    config = NemotronHConfig(
        hybrid_override_pattern=c.pattern,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        mamba_num_heads=c.mamba_num_heads,
        mamba_head_dim=c.mamba_head_dim,
        ssm_state_size=c.ssm_state_size,
        n_groups=c.n_groups,
        chunk_size=chunk,
        intermediate_size=c.intermediate_size,
        n_routed_experts=c.n_routed_experts,
        num_experts_per_tok=c.num_experts_per_tok,
        moe_intermediate_size=c.moe_intermediate_size,
        moe_latent_size=c.moe_latent_size,
        moe_shared_expert_intermediate_size=c.moe_shared_expert_intermediate_size,
        routed_scaling_factor=c.routed_scaling_factor,
        n_group=1,
        topk_group=1,
        attn_implementation="sdpa",
        experts_implementation=experts,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return NemotronHForCausalLM(config).float()


def peer_step(model: NemotronHForCausalLM, length: int) -> Callable[[], None]:
    """One training step of the peer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, CONFIG.vocab_size, (TOKENS // length, length))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(length: int) -> Callable[[], None]:
    """One training step of ours."""
    model = assemble(CONFIG, "fp32", torch.device("cpu"), seed=0)
    store = Store(model, CONFIG.params(), "fp32")
    optimizer = Optimizer(store, OptimizerConfig())
    rows = TOKENS // length
    tokens = torch.randint(0, CONFIG.vocab_size, (TOKENS,))
    future = tokens.roll(-1).unsqueeze(0)
    mask = torch.ones_like(future, dtype=torch.bool)

    def step() -> None:
        segments = Segments((length,) * rows)
        store.zero_grad()
        model.losses(tokens, future, mask, model.context(segments), [1.0 / TOKENS]).lm.backward()
        optimizer.clip(store.norm())
        optimizer.step(1e-4)

    return step


def timed(work: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of each, measured in turn after one warm-up."""
    ours(), theirs()
    pairs = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def best_peer(length: int) -> tuple[str, int]:
    """The peer's fastest experts implementation and chunk size at this sequence length."""
    times = {}
    for experts, chunk in itertools.product(("eager", "grouped_mm"), (32, 64, 128)):
        step = peer_step(peer(experts, chunk), length)
        step()
        times[experts, chunk] = min(timed(step) for _ in range(2))
    return min(times, key=times.__getitem__)


def peer_decode(model: NemotronHForCausalLM, batch: int, new: int) -> Callable[[], None]:
    """Greedy generation by the peer."""
    ids = torch.randint(1, CONFIG.vocab_size, (batch, PROMPT))
    mask = torch.ones_like(ids)

    def run() -> None:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True
        )

    return run


def our_decode(batch: int, new: int) -> Callable[[], None]:
    """Greedy generation by ours."""
    model = assemble(CONFIG, "fp32", torch.device("cpu"), seed=0)
    prompts = torch.randint(1, CONFIG.vocab_size, (batch, PROMPT)).tolist()
    return lambda: void(generate(model, prompts, Sampling(max_new_tokens=new)))


def void(_: object) -> None:
    """Drop a result."""


def training(rounds: int, peak: float) -> list[dict]:
    """Training tokens per second at both lengths."""
    rows = []
    for length in (512, 2048):
        experts, chunk = best_peer(length)
        ours, theirs = interleaved(our_step(length), peer_step(peer(experts, chunk), length), rounds)
        flops = training_flops_per_token(CONFIG, length / 2)
        row = {
            "what": f"training, sequence {length}",
            "ours tokens/s": TOKENS / ours,
            "peer tokens/s": TOKENS / theirs,
            "ratio": theirs / ours,
            "peer flags": f"sdpa, {experts}, chunk {chunk}, fused AdamW",
            "our share of the matrix-product limit": TOKENS / ours * flops / peak,
        }
        rows.append(row)
        show(row)
    return rows


def reading_speed() -> float:
    """Bytes per second at which weights that no cache holds are read for one token."""
    weights = [torch.randn(8192, 256) for _ in range(16)]  # 128 MiB in matrices like the head's
    token = torch.randn(1, 256)

    @torch.inference_mode()
    def read() -> None:
        for weight in weights:
            linear(token, weight)

    read()
    return sum(weight.nbytes for weight in weights) / min(timed(read) for _ in range(5))


def decoding(rounds: int) -> list[dict]:
    """Decode tokens per second: the time of 64 more tokens, prefill not counted."""
    rows = []
    read = count(CONFIG).active - CONFIG.vocab_size * CONFIG.hidden_size  # all but the token table
    limit = reading_speed() / (4 * read)
    for batch in (1, 8):
        models = {name: peer(name, 64).eval() for name in ("eager", "grouped_mm")}
        fastest = min(models, key=lambda n: min(timed(peer_decode(models[n], batch, 16)) for _ in range(3)))
        both = []
        for new in (NEW, 2 * NEW):
            both.append(interleaved(our_decode(batch, new), peer_decode(models[fastest], batch, new), rounds))
        ours, theirs = (both[1][i] - both[0][i] for i in (0, 1))
        row = {
            "what": f"decoding, batch {batch}",
            "ours tokens/s": batch * NEW / ours,
            "peer tokens/s": batch * NEW / theirs,
            "ratio": theirs / ours,
            "peer flags": f"sdpa, {fastest}, cache",
        }
        if batch == 1:  # each step reads the active parameters once; more sequences share dense weights
            row["memory limit tokens/s"] = limit
            row["our share of the memory limit"] = NEW / ours / limit
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """One line per figure."""
    speeds = f"{row['ours tokens/s']:.0f} against {row['peer tokens/s']:.0f} tokens/s"
    print(f"{row['what']}: {speeds}, ratio {row['ratio']:.2f}", flush=True)


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    peak = measure_peak(torch.device("cpu"), torch.float32, seconds=2.0)
    rows = training(args.rounds, peak) + decoding(args.rounds)
    result = {
        "command": "python benchmarks/hybrid_vs_transformers.py",
        "environment": environment() | {"transformers": version("transformers")},
        "peak GFLOP/s": peak / 1e9,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
