"""Our mixture-of-experts layer against the one of transformers: forward and backward, one process.

Three shapes in the proportions of published models, fp32, two threads: fine (64 experts top-8), coarse (8
top-2) and latent (64 top-8 in a narrower width). Both sides have the same weights; outputs and gradients are
compared before anything is timed. The fastest ``experts_implementation`` of the peer counts. ``batched_mm``
copies the weights of an expert for each (token, slot) pair, gigabytes here, so it is only timed on 64 tokens,
beside the others. Both sides profit from an allocator that keeps freed memory (weft.ops.memory). Rounds are
interleaved, figures are medians.

Two numbers bound each shape: its matrix products at the rate of a large one, and the bytes that must move, at
the speed of a large copy (weights read twice and their gradients written; inputs, outputs and their
gradients; what is kept for the backward pass written and read).

    python benchmarks/moe_vs_transformers.py               # writes benchmarks/moe_vs_transformers.json
    python benchmarks/moe_vs_transformers.py --clock cpu --threads 1 --rounds 3 --out /tmp/moe.json
    python benchmarks/moe_vs_transformers.py --profile     # where our time goes
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from weft.build.model import assemble
from weft.nn.context import Context
from weft.nn.moe import MoE
from weft.ops.dispatch import collect, sort, spread
from weft.ops.experts import expert_mlp
from weft.ops.memory import keep_freed_memory
from weft.ops.segments import Segments
from weft.spec.hybrid import HybridConfig
from weft.train.environment import environment

WIDTH, FEW, FLOAT = 512, 64, 4
TARGET, SAME = 1.5, 1e-4
IMPLEMENTATIONS = ("eager", "grouped_mm")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Call = Callable[[Tensor], Tensor]
Clock = Callable[[], float]


def shape(experts: int, top_k: int, inner: int, shared: int, latent: int = 0) -> HybridConfig:
    """A model of one MoE layer."""
    return HybridConfig(
        pattern="E",
        vocab_size=64,
        hidden_size=WIDTH,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=inner,
        moe_shared_expert_intermediate_size=shared,
        moe_latent_size=latent,
        routed_scaling_factor=2.5,
        router_aux_loss_coef=0.0,
    )


SHAPES = {  # config, tokens
    "fine": (shape(64, 8, 192, 384), 2048),
    "coarse": (shape(8, 2, 1792, 512), 1024),
    "latent": (shape(64, 8, 336, 672, latent=128), 2048),
}


def peer(config: HybridConfig, ours: MoE, experts: str) -> NemotronHMoE:
    """transformers' layer with our weights."""
    made = NemotronHConfig(
        hybrid_override_pattern=config.pattern,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        n_routed_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_latent_size=config.moe_latent_size or None,
        routed_scaling_factor=config.routed_scaling_factor,
        n_group=1,
        topk_group=1,
        experts_implementation=experts,
    )
    layer = NemotronHMoE(made).float()
    with torch.no_grad():
        for theirs, own in zip(parameters(layer), parameters(ours), strict=True):
            theirs.copy_(own)
    return layer


def parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Parameters in an order that both sides share."""
    names = dict(layer.named_parameters())
    ours = ["router", "experts.up", "experts.down", "shared.up", "shared.down", "latent_down", "latent_up"]
    theirs = ["gate", "experts.up", "experts.down", "shared_experts.up", "shared_experts.down", "fc1", "fc2"]
    order = ours if isinstance(layer, MoE) else theirs
    return [names[name] for key in order for name in names if name.startswith(key)]


def our_call(layer: MoE, tokens: int) -> Call:
    """Our layer as a function of activations ``[tokens, width]``."""
    segments = Segments((tokens,))
    return lambda x: layer(x, Context(segments), "layer")[0]


def gradients(call: Call, layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad([y], [x, *parameters(layer)], [cotangent])]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of any tensor, as a share of its largest element."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


def timed(call: Call, layer: nn.Module, x: Tensor, cotangent: Tensor, clock: Clock) -> float:
    """Seconds of one forward and backward pass; gradients are freed before."""
    for parameter in layer.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_()
    start = clock()
    call(x).backward(cotangent)
    return clock() - start


def compare(
    config: HybridConfig, ours: MoE, tokens: int, names: tuple[str, ...], rounds: int, clock: Clock
) -> dict:
    """Milliseconds of our layer and of the peer's implementations, taken in turn.

    Raises:
        SystemExit: outputs or gradients differ by more than 1e-4 of the largest element.
    """
    x, cotangent = torch.randn(tokens, WIDTH), torch.randn(tokens, WIDTH)
    layers = {"ours": ours} | {name: peer(config, ours, name) for name in names}
    calls: dict[str, Call] = layers | {"ours": our_call(ours, tokens)}
    want = gradients(calls["ours"], ours, x, cotangent)
    difference = max(
        largest_difference(gradients(calls[name], layers[name], x, cotangent), want) for name in names
    )
    if not difference <= SAME:
        raise SystemExit(f"the two layers differ by {difference:.1e} of the largest element; limit {SAME}")
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds + 1):
        for name in sorted(layers, reverse=bool(turn % 2)):  # none is always first
            times[name].append(timed(calls[name], layers[name], x, cotangent, clock))
    found = {name: 1e3 * statistics.median(own[1:]) for name, own in times.items()}
    ratio = min(found[name] for name in names) / found["ours"]
    return {"tokens": tokens, "ms": found, "ratio": ratio, "largest difference": difference}


def kept(config: HybridConfig, ours: MoE, tokens: int) -> dict[str, float]:
    """Bytes of each token that the routed experts keep for the backward pass, weights apart.

    The limit is that of activations, ``b k (w + 2 f)``: bytes of a number, experts of a token, the width that
    experts read, and their inner width. Indices and routing weights are in the figure.
    """
    mixer, k, width = ours.config, config.num_experts_per_tok, ours.config.width
    z = torch.randn(tokens, width, requires_grad=True)
    weights = torch.rand(tokens, k, requires_grad=True)
    up, down = ours.experts.up_proj, ours.experts.down_proj
    mine = {leaf.untyped_storage().data_ptr() for leaf in (z, weights, up, down)}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in mine:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    chosen = torch.rand(tokens, mixer.experts).topk(k, 1).indices
    order, back, counts, full = sort(chosen, mixer.experts)
    with saved_tensors_hooks(pack, lambda t: t):
        own = spread(weights.view(-1, 1), order, back.view(-1, 1), full).squeeze(1)
        rows = expert_mlp(spread(z, order, back, full), up, down, counts, own)
        y = collect(rows, order, back, full)
    limit = FLOAT * k * (width + 2 * mixer.mlp)
    found = sum(sizes.values()) / len(y)  # y: what holds the saved tensors until here
    return {"bytes": found, "b k (w + 2 f)": limit, "share": found / limit}


def bounds(config: HybridConfig, ours: MoE, tokens: int, peak: float, speed: float) -> dict[str, float]:
    """Milliseconds of the matrix products alone, and of the bytes that must move."""
    mixer, k = ours.config, config.num_experts_per_tok
    products = 3 * tokens * mixer.flops_per_token(0.0)
    inner = k * (mixer.width + mixer.mlp) + mixer.shared_mlp  # kept numbers of a token
    numbers = 3 * sum(p.numel() for p in ours.parameters()) + tokens * (4 * WIDTH + 2 * inner)
    return {
        "GFLOP": products / 1e9,
        "products ms": 1e3 * products / peak,
        "MB": FLOAT * numbers / 1e6,
        "bytes ms": 1e3 * FLOAT * numbers / speed,
    }


def machine(clock: Clock) -> tuple[float, float]:
    """Matrix-product operations per second; bytes read and written per second by a copy no cache holds."""
    square, long = torch.randn(1024, 1024), torch.randn(2**25)
    out, product = torch.empty_like(long), torch.empty_like(square)
    works = (lambda: torch.mm(square, square, out=product)), (lambda: out.copy_(long))
    best = [float("inf"), float("inf")]
    for turn in range(80):
        start = clock()
        works[turn % 2]()
        best[turn % 2] = min(best[turn % 2], clock() - start)
    return 2 * 1024**3 / best[0], 2 * long.nbytes / best[1]


def measure(name: str, rounds: int, clock: Clock, peak: float, speed: float) -> dict:
    """All figures of one shape."""
    config, tokens = SHAPES[name]
    ours = layer_of(config)
    found = compare(config, ours, tokens, IMPLEMENTATIONS, rounds, clock)
    limit, times = bounds(config, ours, tokens, peak, speed), found["ms"]
    found |= {
        "limits": limit,
        "our share of the matrix-product rate": limit["products ms"] / times["ours"],
        "ratio at the full rate": found["ratio"] * times["ours"] / limit["products ms"],
        "kept by the routed experts, per token": kept(config, ours, tokens),
        f"{FEW} tokens": compare(config, ours, FEW, (*IMPLEMENTATIONS, "batched_mm"), rounds, clock),
    }
    for key, part in (
        ("ms", times),
        ("limits", limit),
        (f"ms of {FEW} tokens", found[f"{FEW} tokens"]["ms"]),
    ):
        print(f"{name}, {key}:", ", ".join(f"{side} {value:.1f}" for side, value in part.items()))
    print(
        f"{name}: ratio {found['ratio']:.2f}; {found['ratio at the full rate']:.2f} at the full rate",
        flush=True,
    )
    return found


def layer_of(config: HybridConfig) -> MoE:
    """The one mixer of a model of this config."""
    return assemble(config, "fp32", torch.device("cpu"), seed=0).layers["0"].mixer


def profile(name: str) -> None:
    """Print where our time goes."""
    config, tokens = SHAPES[name]
    ours = layer_of(config)
    x, cotangent = torch.randn(tokens, WIDTH), torch.randn(tokens, WIDTH)
    call = our_call(ours, tokens)
    timed(call, ours, x, cotangent, time.perf_counter)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(5):
            timed(call, ours, x, cotangent, time.perf_counter)
    print(
        name,
        profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40),
    )


def main() -> None:
    """Measure every shape, print, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--only", nargs="*", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--profile", action="store_true", help="print where our time goes instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    if args.profile:
        for name in args.only:
            profile(name)
        return
    clock = CLOCKS[args.clock]
    peak, speed = machine(clock)
    print(f"{args.threads} threads: {peak / 1e9:.0f} GFLOP/s, {speed / 1e9:.0f} GB/s")
    result = {
        "command": " ".join(["python benchmarks/moe_vs_transformers.py", *sys.argv[1:]]),
        "clock": args.clock,
        "environment": environment() | {"transformers": version("transformers")},
        "peak GFLOP/s": peak / 1e9,
        "copy GB/s": speed / 1e9,
        "target": TARGET,
        "shapes": {name: measure(name, args.rounds, clock, peak, speed) for name in args.only},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
