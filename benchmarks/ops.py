"""Time of each operation against the two numbers that bound it: arithmetic and memory traffic.

For every operation, at the sizes of ``benchmarks/hybrid_vs_transformers.py`` (4096 tokens): the least
floating-point operations and the least bytes (inputs read once, outputs written once; in the backward
pass also gradients), the time these need at the machine's measured matrix-product rate and copy
bandwidth, and how near the back ends come; ``ref/fast`` says how many times longer the reference takes.
Rounds are interleaved, figures are medians; what takes over a second is called once. What a layout calls in
place of an operation stands beside it: ``across`` beside the scan, ``attention runs`` beside attention.

    python benchmarks/ops.py                       # all, two threads; writes benchmarks/ops.json
    python benchmarks/ops.py --only scan conv --clock cpu --threads 1 --rounds 3 --out /tmp/ops.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.ops.attention import attend, attend_cached, attend_runs, attend_runs_backward
from weft.ops.backend import use
from weft.ops.conv import causal_conv, conv_step
from weft.ops.cross_entropy import linear_cross_entropy
from weft.ops.experts import expert_mlp
from weft.ops.memory import keep_freed_memory
from weft.ops.mlp import mlp
from weft.ops.norm import gated_group_norm, rms_norm
from weft.ops.router import choice_frequency, count_choices, document_balance, route
from weft.ops.scan import across, ssd, ssd_step
from weft.ops.segments import Segments
from weft.plan.runs import Piece, contiguous, pieces
from weft.train.environment import environment

TOKENS, WIDTH, VOCAB = 4096, 256, 8192
HEADS, DIM, GROUPS, STATE, TAPS, CHUNK = 8, 64, 1, 128, 4, 64
EXPERTS, TOP_K, LATENT, INNER = 32, 4, 128, 168
CHANNELS = HEADS * DIM + 2 * GROUPS * STATE
FLOAT = 4  # bytes
LONG = 1.0  # seconds


@dataclass(frozen=True)
class Case:
    """One operation at one size; ``flops`` and ``numbers`` (read or written) are those of the forward pass.

    The backward pass is counted as twice both. ``slow`` says that the reference is timed too.
    """

    name: str
    op: str
    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    flops: float
    numbers: float
    slow: bool = True
    backward: bool = True


def rand(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape)


def mamba_cases(length: int) -> Iterator[Case]:
    """Scan and convolution over sequences of ``length`` tokens."""
    t, segments = TOKENS, Segments((length,) * (TOKENS // length))
    xBC = rand(t, CHANNELS + HEADS * DIM + HEADS)[:, HEADS * DIM : -HEADS]
    sizes = [HEADS * DIM, GROUPS * STATE, GROUPS * STATE]
    x, B, C = (
        part.unflatten(1, (-1, w))
        for part, w in zip(rand(t, CHANNELS).split(sizes, 1), (DIM, STATE, STATE), strict=True)
    )
    dt, A, D = torch.rand(t, HEADS).add_(0.01), -torch.arange(1.0, HEADS + 1), rand(HEADS)
    inner = HEADS * DIM
    flops = t * (CHUNK * (GROUPS * STATE + inner) + 4 * inner * STATE)
    scan = partial(_scan, segments)
    numbers = t * (2 * inner + 2 * GROUPS * STATE)
    yield Case(f"scan {length}", "scan", scan, (x, dt, A, B, C, D), flops, numbers)
    numbers = length * (inner + GROUPS * STATE) + inner * STATE
    given = dt[:length], A, C[:length], rand(HEADS, DIM, STATE)
    yield Case(f"across {length}", "scan", across, given, 2 * length * inner * STATE, numbers)
    conv = partial(_conv, segments)
    yield Case(
        f"conv {length}",
        "conv",
        conv,
        (xBC, rand(CHANNELS, TAPS), rand(CHANNELS)),
        2 * t * TAPS * CHANNELS,
        2 * t * CHANNELS,
    )


def _scan(segments: Segments, *t: Tensor) -> Any:
    x, dt, A, B, C, D = t
    return ssd(x, dt, A, B, C, D, segments, CHUNK)


def _conv(segments: Segments, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return causal_conv(x, weight, bias, segments)


def attention_cases(length: int) -> Iterator[Case]:
    """Attention with 8 query and 2 key/value heads of 32."""
    segments = Segments((length,) * (TOKENS // length))
    q, k, v = rand(TOKENS, 12, 32).split([8, 2, 2], dim=1)
    call = partial(_attend, segments)
    yield Case(
        f"attention {length}", "attention", call, (q, k, v), 2 * TOKENS * length * 8 * 32, TOKENS * 20 * 32
    )


def runs_cases(length: int) -> Iterator[Case]:
    """The same as runs of queries against runs of keys, whose backward pass is a call of its own."""
    holding = contiguous((TOKENS,))[0]
    blocks = pieces((length,) * (TOKENS // length), holding, holding)
    qkv = tuple(rand(TOKENS, 12, 32).split([8, 2, 2], dim=1))
    for factor, name, call in ((1, "", _runs), (3, " +backward", _runs_both)):
        yield Case(
            f"attention runs {length}{name}",
            "attention",
            partial(call, blocks),
            qkv,
            factor * 2 * TOKENS * length * 8 * 32,
            factor * TOKENS * 20 * 32,
            slow=False,
            backward=False,
        )


def _runs(blocks: list[Piece], q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attend_runs(q, k, v, blocks, 32**-0.5)


def _runs_both(blocks: list[Piece], q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attend_runs_backward(q, *_runs(blocks, q, k, v), q, k, v, blocks, 32**-0.5)


def _attend(segments: Segments, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attend(q, k, v, segments, 32**-0.5)


def width_cases() -> Iterator[Case]:
    """Operations that look at one token at a time."""
    t, inner = TOKENS, HEADS * DIM
    z = rand(t, inner + CHANNELS + HEADS)[:, :inner]
    yield Case(
        "rms_norm",
        "norm",
        partial(rms_norm, eps=1e-5),
        (rand(t, WIDTH), rand(WIDTH)),
        4 * t * WIDTH,
        2 * t * WIDTH,
    )
    gated = partial(_gated, inner // GROUPS)
    yield Case("gated_norm", "norm", gated, (rand(t, inner), z, rand(inner)), 8 * t * inner, 3 * t * inner)
    weights = (rand(1024, WIDTH), rand(WIDTH, 1024))
    numbers = t * 2 * WIDTH + 2 * WIDTH * 1024
    yield Case("mlp 1024", "mlp", mlp, (rand(t, WIDTH), *weights), 4 * t * WIDTH * 1024, numbers)
    targets = torch.randint(VOCAB, (t,))
    loss = partial(_loss, targets)
    numbers = t * WIDTH + VOCAB * WIDTH
    yield Case(
        "cross_entropy",
        "cross_entropy",
        loss,
        (rand(t, WIDTH), rand(VOCAB, WIDTH) * 0.02),
        2 * t * WIDTH * VOCAB,
        numbers,
    )


def _gated(group: int, y: Tensor, z: Tensor, weight: Tensor) -> Any:
    return gated_group_norm(y, z, weight, group, 1e-5)


def _loss(targets: Tensor, hidden: Tensor, weight: Tensor) -> Any:
    return linear_cross_entropy(hidden, weight, targets, 1024, 1 / TOKENS)


def expert_cases() -> Iterator[Case]:
    """Routing, and experts with the loads of a random router."""
    logits = rand(TOKENS, EXPERTS)
    bias, segments = torch.zeros(EXPERTS), Segments((512,) * (TOKENS // 512))
    small = TOKENS * (EXPERTS + 2 * TOP_K)
    yield Case("route", "router", partial(_route, bias), (logits,), 0, small)
    experts = route(logits, bias, TOP_K)[1]
    yield Case(
        "balance", "router", partial(_balance, experts, segments), (logits.sigmoid(),), 0, TOKENS * EXPERTS
    )
    counts = torch.bincount(experts.flatten(), minlength=EXPERTS)
    yield expert_case("experts", counts)


def expert_case(name: str, counts: Tensor, backward: bool = True) -> Case:
    """Experts with given loads."""
    rows, used = int(counts.sum()), int(counts.count_nonzero())
    inputs = (
        rand(rows, LATENT),
        rand(EXPERTS, INNER, LATENT),
        rand(EXPERTS, LATENT, INNER),
        torch.rand(rows),
    )
    numbers = 2 * rows * LATENT + 2 * used * INNER * LATENT
    return Case(
        name,
        "experts",
        partial(_experts, counts),
        inputs,
        4 * rows * LATENT * INNER,
        numbers,
        backward=backward,
    )


def _route(bias: Tensor, logits: Tensor) -> Any:
    return route(logits, bias, TOP_K)[0]


def _balance(experts: Tensor, segments: Segments, scores: Tensor) -> Any:
    ids, lengths = segments.ids(scores.device), torch.tensor(segments.lengths, dtype=scores.dtype)
    chosen = count_choices(experts, ids, len(lengths), scores.shape[1])
    return document_balance(scores, ids, 1e-4 * choice_frequency(chosen, lengths, TOP_K))


def _experts(counts: Tensor, x: Tensor, up: Tensor, down: Tensor, weights: Tensor) -> Any:
    return expert_mlp(x, up, down, counts, weights)


def decode_cases(batch: int) -> Iterator[Case]:
    """One token for each of ``batch`` sequences, 256 tokens in the cache."""
    counts = torch.bincount(torch.randint(EXPERTS, (batch * TOP_K,)), minlength=EXPERTS)
    yield expert_case(f"decode experts {batch}", counts, backward=False)
    ones, inner = Segments((1,) * batch), HEADS * DIM
    step = (
        rand(batch, HEADS, DIM, STATE),
        rand(batch, HEADS, DIM),
        torch.rand(batch, HEADS),
        -torch.rand(HEADS),
        rand(batch, GROUPS, STATE),
        rand(batch, GROUPS, STATE),
        rand(HEADS),
    )
    yield Case(
        f"decode scan {batch}",
        "scan",
        ssd_step,
        step,
        5 * batch * inner * STATE,
        2 * batch * inner * STATE,
        backward=False,
    )
    conv = (rand(batch, CHANNELS, TAPS - 1), rand(batch, CHANNELS), rand(CHANNELS, TAPS), rand(CHANNELS))
    yield Case(
        f"decode conv {batch}", "conv", conv_step, conv, 0, batch * CHANNELS * 2 * TAPS, backward=False
    )
    qkv = (
        rand(batch, 8, 32),
        rand(batch, 2, 32),
        rand(batch, 2, 32),
        rand(batch, 2, 300, 32),
        rand(batch, 2, 300, 32),
    )
    numbers = batch * 256 * 2 * 2 * 32
    for name, past in (("even", [256] * batch), ("ragged", [256 - s for s in range(batch)])):
        call = partial(_cached, ones, past)
        yield Case(f"decode attention {batch} {name}", "attention", call, qkv, 0, numbers, backward=False)


def _cached(segments: Segments, past: list[int], *t: Tensor) -> Any:
    q, k, v, keys, values = t
    return attend_cached(q, k, v, keys, values, segments, past, 32**-0.5)


def run(case: Case, backward: bool, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    leaves = [t.detach().requires_grad_(backward) for t in case.inputs]
    with torch.set_grad_enabled(backward):
        if not backward:
            start = clock()
            case.call(*leaves)
            return clock() - start
        out = case.call(*leaves)
        cotangent = torch.ones_like(out)
        del out
        start = clock()
        torch.autograd.grad([case.call(*leaves)], leaves, [cotangent])
        return clock() - start


def compare(case: Case, backward: bool, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each back end, in turn."""
    names = ["fast", "reference"] if case.slow else ["fast"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            if max(times[name], default=0.0) < LONG:
                with use(**{case.op: name}):
                    times[name].append(run(case, backward, clock))
    return {name: statistics.median(values[1:] or values) for name, values in times.items()}


def limits() -> tuple[float, float]:
    """Matrix-product operations per second, and bytes per second of a copy that no cache holds."""
    a, b, long = rand(2048, 256), rand(256, 1024), rand(2**25)
    out = torch.empty_like(long)
    product = min(_wall(lambda: a @ b) for _ in range(50))
    copy = min(_wall(lambda: out.copy_(long)) for _ in range(10))
    return 2 * 2048 * 256 * 1024 / product, 2 * FLOAT * 2**25 / copy


def _wall(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(cases: Sequence[Case], rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Print one line per operation and direction; the same as rows of figures."""
    peak, bandwidth = limits()
    print(f"{torch.get_num_threads()} threads: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    print(
        f"{'operation':29} {'MFLOP':>8} {'MB':>7} {'bound ms':>9} {'fast ms':>9} {'of bound':>8} "
        f"{'reference':>9} {'ref/fast':>8}"
    )
    rows = []
    for case in cases:
        for backward in (False, True) if case.backward else (False,):
            factor = 3 if backward else 1
            bound = factor * max(case.flops / peak, FLOAT * case.numbers / bandwidth)
            times = compare(case, backward, rounds, clock)
            row = {
                "operation": case.name + (" +backward" if backward else ""),
                "MFLOP": factor * case.flops / 1e6,
                "MB": factor * FLOAT * case.numbers / 1e6,
                "bound ms": bound * 1e3,
                "fast ms": times["fast"] * 1e3,
            }
            line = "{:29} {:8.0f} {:7.1f} {:9.3f} {:9.3f}".format(*row.values())
            line += f" {bound / times['fast']:8.0%}"
            if case.slow:
                ratio = times["reference"] / times["fast"]
                row |= {"reference ms": times["reference"] * 1e3, "reference over fast": ratio}
                line += f" {times['reference'] * 1e3:9.3f} {ratio:8.1f}"
            print(line, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="operations to time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process, for a busy machine"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    training = chain(
        mamba_cases(512),
        mamba_cases(2048),
        attention_cases(512),
        attention_cases(2048),
        runs_cases(512),
        runs_cases(2048),
        width_cases(),
        expert_cases(),
    )
    cases = chain(training, decode_cases(1), decode_cases(8))
    chosen = [case for case in cases if not args.only or case.op in args.only or case.name in args.only]
    rows = report(chosen, args.rounds, time.perf_counter if args.clock == "wall" else time.process_time)
    result = {
        "command": " ".join(["python benchmarks/ops.py", *sys.argv[1:]]),
        "clock": args.clock,
        "environment": environment(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
