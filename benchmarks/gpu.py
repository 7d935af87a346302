"""Training speed of a Nano-shaped stack on one GPU: tokens/s, model FLOPs utilization, peak memory.

    python benchmarks/gpu.py            # writes benchmarks/gpu.json; says so and stops without a GPU

The layers are those of Nemotron 3 Nano 30B-A3B (hidden 2688, 128 experts top-6), as many of its
pattern's first layers as fit with the head of the full vocabulary, bf16 with fp32 master weights.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from weft.build.model import assemble
from weft.models.presets import NEMOTRON3_NANO_30B
from weft.ops.segments import Segments
from weft.parallel.store import Store
from weft.spec.count import count, mean_context, state_bytes, training_flops_per_token
from weft.spec.hybrid import HybridConfig
from weft.spec.run import OptimizerConfig
from weft.train.flops import measure_peak
from weft.train.optimizer import Optimizer

LENGTH = 8192


def largest(memory: int) -> HybridConfig:
    """The first layers of Nano whose training state takes at most 60 % of ``memory`` bytes."""
    whole = NEMOTRON3_NANO_30B
    for layers in range(len(whole.pattern), 0, -1):
        config = replace(whole, pattern=whole.pattern[:layers])
        if state_bytes(config, "bf16") < 0.6 * memory:
            return config
    raise SystemExit(f"no layer of Nano fits into {memory / 2**30:.0f} GiB")


def measure(config: HybridConfig, rounds: int) -> dict:
    """Median step time of one sequence of LENGTH tokens, with recomputation."""
    device = torch.device("cuda")
    model = assemble(config, "bf16", device, seed=0)
    model.set_recompute(True)
    store = Store(model, config.params(), "bf16")
    optimizer = Optimizer(store, OptimizerConfig())
    tokens = torch.randint(0, config.vocab_size, (LENGTH,), device=device)
    future = tokens.roll(-1).unsqueeze(0)
    mask = torch.ones_like(future, dtype=torch.bool)

    def step() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        store.zero_grad()
        ctx = model.context(Segments((LENGTH,)))
        model.losses(tokens, future, mask, ctx, [1.0 / LENGTH]).lm.backward()
        optimizer.clip(store.norm())
        optimizer.step(1e-4)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    step(), step()
    seconds = statistics.median(step() for _ in range(rounds))
    peak = measure_peak(device, torch.bfloat16)
    flops = training_flops_per_token(config, mean_context((LENGTH,)))
    return {
        "device": torch.cuda.get_device_name(),
        "pattern": config.pattern,
        "parameters": count(config).total,
        "tokens per second": LENGTH / seconds,
        "model FLOPs utilization": LENGTH / seconds * flops / peak,
        "measured peak TFLOP/s": peak / 1e12,
        "peak memory GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Measure and write, or say that there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: no CUDA device here, nothing measured")
        return
    result = measure(largest(torch.cuda.get_device_properties(0).total_memory), args.rounds)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
