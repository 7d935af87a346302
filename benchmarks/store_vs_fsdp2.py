"""Our store at level 3 against torch's FSDP2 on the same layers, ranks and tokens.

Two Gloo processes of one thread each train the same stack of residual layers (forward, backward, fused
AdamW). Sides take turns in fresh processes; times are medians over all steps of a side, memory is the largest
resident size of a process above its size before the parameters were made.

    python benchmarks/store_vs_fsdp2.py            # writes benchmarks/store_vs_fsdp2.json
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weft.build.model import assemble
from weft.models.hybrid import HybridLM
from weft.nn.context import Context
from weft.ops.segments import Segments
from weft.parallel.c10d import C10dComm
from weft.parallel.mesh import mesh_of
from weft.parallel.store import Store
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import LayoutConfig, PlanConfig, StoreConfig
from weft.spec.run import OptimizerConfig
from weft.train.environment import environment
from weft.train.optimizer import Optimizer

CONFIG = HybridConfig(
    pattern="M-*-M-*-M-*-",
    vocab_size=16,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    ssm_state_size=64,
    n_groups=2,
    chunk_size=64,
    intermediate_size=2048,
)
RANKS, DOCUMENTS, STEPS, WARM = 2, (512,) * 2, 6, 2
SIDES = ("ours", "fsdp2")


class Stack(nn.Module):
    """The residual layers alone."""

    def __init__(self, model: HybridLM) -> None:
        super().__init__()
        self.layers = model.layers

    def forward(self, x: Tensor) -> Tensor:
        """All layers, and a loss."""
        ctx = Context(Segments(DOCUMENTS))
        for i, layer in enumerate(self.layers):
            x = layer(x, ctx, f"layers.{i}")
        return x.square().mean()

    def units(self) -> dict[str, nn.Module]:
        """Each layer."""
        return {f"layers.{i}": layer for i, layer in enumerate(self.layers)}


def ours(stack: Stack) -> Callable[[Tensor], None]:
    """A training step under our store."""
    plan = PlanConfig(decoder=LayoutConfig(dp=RANKS, store=StoreConfig(level=3)))
    specs = [spec for spec in CONFIG.params() if spec.name.startswith("layers.")]
    store = Store(stack, specs, "fp32", mesh_of(plan, C10dComm()))
    optimizer = Optimizer(store, OptimizerConfig(weight_decay=0.0))

    def step(x: Tensor) -> None:
        store.zero_grad()
        stack(x).backward()
        store.reduce()
        optimizer.step(1e-4)

    return step


def fsdp2(stack: Stack) -> Callable[[Tensor], None]:
    """A training step under FSDP2, parameters freed after each layer."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(stack, mesh=mesh, reshard_after_forward=True)
    adamw = torch.optim.AdamW(stack.parameters(), lr=1e-4, fused=True, weight_decay=0.0)

    def step(x: Tensor) -> None:
        adamw.zero_grad()
        stack(x).backward()
        adamw.step()

    return step


def resident() -> float:
    """Largest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(side: str) -> None:
    """One rank of one side; rank 0 prints its figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    x = torch.randn(sum(DOCUMENTS), CONFIG.hidden_size, requires_grad=True)
    before = resident()
    stack = Stack(assemble(CONFIG, "fp32", torch.device("cpu"), seed=0))
    step = {"ours": ours, "fsdp2": fsdp2}[side](stack)
    times = []
    for _ in range(WARM + STEPS):
        dist.barrier()
        start = time.perf_counter()
        step(x)
        times.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": times[WARM:], "mib": resident() - before}))
    dist.destroy_process_group()


def gang(side: str) -> dict:
    """One turn of a side."""
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*script, __file__, "--side", side]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Take turns, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="be one rank of this side")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments.side)
        return
    turns: dict[str, list[dict]] = {side: [] for side in SIDES}
    for turn in range(arguments.turns):
        for side in sorted(SIDES, reverse=bool(turn % 2)):
            turns[side].append(gang(side))
    figures = {
        side: {
            "ms": 1e3 * statistics.median(s for turn in found for s in turn["seconds"]),
            "mib": statistics.median(turn["mib"] for turn in found),
        }
        for side, found in turns.items()
    }
    result: dict = {"sides": figures}
    result["ours_over_fsdp2"] = {
        name: figures["ours"][name] / figures["fsdp2"][name] for name in ("ms", "mib")
    }
    print(json.dumps(result, indent=1))
    result["environment"] = environment(torch.device("cpu"))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
