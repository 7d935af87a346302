"""What Weft's layers add to the operations they call: a block of each kind against a plain script.

The plain side is the functions below: the same ``weft.ops`` calls on the same tensors, without modules, slots
or context. Hidden 512, 4,096 tokens in documents of 512, fp32; forward and backward, interleaved, medians.

    python benchmarks/block_overhead.py            # writes benchmarks/block_overhead.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.build.model import assemble
from weft.nn.block import Block
from weft.nn.context import Context
from weft.ops.attention import attend
from weft.ops.conv import causal_conv
from weft.ops.dispatch import collect, spread
from weft.ops.experts import expert_mlp
from weft.ops.linear import linear
from weft.ops.memory import keep_freed_memory
from weft.ops.mlp import mlp
from weft.ops.norm import gated_group_norm, rms_norm
from weft.ops.router import route
from weft.ops.scan import ssd
from weft.ops.segments import Segments
from weft.spec.hybrid import HybridConfig
from weft.train.environment import environment

CONFIG = HybridConfig(
    pattern="M*-E",
    vocab_size=64,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=2,
    chunk_size=64,
    intermediate_size=2048,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=336,
    moe_latent_size=256,
    moe_shared_expert_intermediate_size=672,
    router_aux_loss_coef=0.0,
)
DOCUMENTS = (512,) * 8
ROUNDS = 9
LIMIT = 1.05
Weights = dict[str, Tensor]


def mamba(x: Tensor, w: Weights, segments: Segments) -> Tensor:
    """The Mamba-2 mixer."""
    inner, group = 16 * 64, 2 * 128
    z, xBC, dt = linear(x, w["in_proj.weight"]).split([inner, inner + 2 * group, 16], -1)
    u, B, C = causal_conv(xBC, w["conv.weight"], w["conv.bias"], segments).split([inner, group, group], -1)
    dt = F.softplus(dt + w["dt_bias"]).clamp(0.0, float("inf"))
    heads, groups = u.unflatten(-1, (16, 64)), (B.unflatten(-1, (2, 128)), C.unflatten(-1, (2, 128)))
    y = ssd(heads, dt, -w["A_log"].exp(), *groups, w["D"], segments, 64)
    y = gated_group_norm(y.flatten(-2), z, w["norm.weight"], 512, 1e-5)
    return linear(y, w["out_proj.weight"])


def attention(x: Tensor, w: Weights, segments: Segments) -> Tensor:
    """Grouped-query attention."""
    q, k, v = linear(x, w["qkv_proj.weight"]).unflatten(-1, (-1, 64)).split([8, 2, 2], -2)
    return linear(attend(q, k, v, segments, 64**-0.5).flatten(-2), w["o_proj.weight"])


def dense(x: Tensor, w: Weights, segments: Segments) -> Tensor:
    """The squared-ReLU MLP."""
    return mlp(x, w["up_proj.weight"], w["down_proj.weight"])


def experts(x: Tensor, w: Weights, segments: Segments) -> Tensor:
    """The latent mixture of experts, without statistics."""
    logits = linear(x, w["router.weight"])
    weights, chosen, _ = route(logits, w["router.bias"], 4)
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    back = torch.argsort(order).view(chosen.shape)
    counts = torch.bincount(flat, minlength=16)
    rows = spread(linear(x, w["latent_down.weight"]), order, back)
    ups = (w["experts.up_proj"], w["experts.down_proj"])
    y = collect(expert_mlp(rows, *ups, counts, weights.flatten()[order]), order, back)
    shared = mlp(x, w["shared.up_proj.weight"], w["shared.down_proj.weight"])
    return linear(y, w["latent_up.weight"]) + shared


PLAIN = {"M": mamba, "*": attention, "-": dense, "E": experts}


def timed(run: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, weights: Weights) -> float:
    """Seconds of one forward and backward pass."""
    for weight in weights.values():
        weight.grad = None
    start = time.perf_counter()
    run(x).backward(cotangent)
    return time.perf_counter() - start


def measure(symbol: str, block: Block) -> dict[str, float]:
    """Medians of both sides for one kind of block, after one round to warm up."""
    segments = Segments(DOCUMENTS)
    x = torch.randn(sum(DOCUMENTS), CONFIG.hidden_size, requires_grad=True)
    cotangent = torch.randn(sum(DOCUMENTS), CONFIG.hidden_size)
    named = [*block.mixer.named_parameters(), *block.mixer.named_buffers()]
    weights, norm = dict(named), block.norm.weight
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: block(x, Context(segments), "layer"),
        "plain": lambda x: x + PLAIN[symbol](rms_norm(x, norm, 1e-5), weights, segments),
    }
    torch.testing.assert_close(sides["ours"](x), sides["plain"](x))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name in sorted(sides, reverse=bool(turn % 2)):  # neither side is always first
            times[name].append(timed(sides[name], x, cotangent, weights))
    medians = {f"{name}_ms": 1e3 * statistics.median(found[1:]) for name, found in times.items()}
    return {**medians, "ratio": medians["ours_ms"] / medians["plain_ms"]}


def main() -> None:
    """Measure every kind of block, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = assemble(CONFIG, "fp32", torch.device("cpu"), seed=0)
    figures = {s: measure(s, block) for s, block in zip(CONFIG.pattern, model.layers, strict=True)}
    ours, plain = (sum(f[f"{side}_ms"] for f in figures.values()) for side in ("ours", "plain"))
    result = {"blocks": figures, "all": {"ours_ms": ours, "plain_ms": plain, "ratio": ours / plain}}
    print(json.dumps(result, indent=1))
    result |= {"limit": LIMIT, "environment": environment(torch.device("cpu"))}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
