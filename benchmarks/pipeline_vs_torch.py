"""Our executor against torch.distributed.pipelining: the same stages, passes, microbatches and values.

Four Gloo processes of one thread each; both sides take turns in the same processes, times are medians of
rounds, gradients are compared first. Work of a stage, by name:

    hybrid    Mamba, MLP and attention layers, the same modules on both sides
    mlp       MLP layers where B and W are apart: ours with queued gradients, torch's of plain ``F.linear``,
              whose backward nodes it can split (it runs a node of ours twice)
    paced     a stage sleeps where it would compute, as if each rank had a device of its own
    tiny      one product of 16 x 16: what is left is the cost of actions

    python benchmarks/pipeline_vs_torch.py            # writes benchmarks/pipeline_vs_torch.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline_stages import DEVICE, MICROBATCHES, PACE, PATTERNS, RANKS, SINGLE, Job, Paced, Stage, job
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from weft.ops.late import attach
from weft.parallel.c10d import C10dComm
from weft.parallel.executor import Executor, Made, Work
from weft.parallel.links import Links
from weft.parallel.mesh import mesh_of
from weft.plan.pipelines import SPLIT
from weft.plan.placing import complete
from weft.plan.prove import prove
from weft.plan.schedule import Action, Edge, Lists, Schedule
from weft.plan.simulate import simulate
from weft.spec.layout import LayoutConfig, PlanConfig
from weft.train.environment import environment

TORCH: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
EXACT = 1e-5  # largest difference of a gradient, as a share of its largest element
SOME = 3  # microbatches from which the time of a rank's passes is known
STEPS = {"hybrid": 1, "mlp": 1, "paced": 1, "tiny": 10}  # of one measurement
ROUNDS = {"hybrid": 5, "mlp": 5, "paced": 9, "tiny": 15}


Step = Callable[[], None]


def theirs(what: Job, modules: Mapping[str, Stage]) -> tuple[Step, Lists]:
    """A step of torch, and its order of passes."""
    count, last = len(what.graph.home), str(len(what.graph.home) - 1)
    stages = [
        PipelineStage(
            module,
            int(name),
            count,
            DEVICE,
            dw_builder=module.weights if isinstance(module, Paced) and module.apart else None,
        )
        for name, module in modules.items()
    ]
    given: Any = stages[0] if what.kind in SINGLE else stages

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return modules[last].loss(output, target)

    schedule = TORCH[what.kind](given, MICROBATCHES, loss_fn=loss, scale_grads=False)
    # Lists that torch gives of these two are for pictures (not even valid); it runs them in our order.
    order = _lists(schedule.pipeline_order) if what.kind not in SINGLE else what.order
    feed = (what.feed,) if "0" in modules else ()
    target = what.targets if last in modules else None
    return lambda: schedule.step(*feed, target=target, return_outputs=False), order


def _lists(order: Mapping[int, Iterable[Any]]) -> Lists:
    """Torch's order in our words."""
    words = {"FORWARD": "F", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "BW"}
    return tuple(
        tuple(
            Action(op, str(done.stage_index), done.microbatch_index)  # pyright: ignore[reportArgumentType]
            for done in order[rank]
            if done is not None and done.computation_type.name in words
            for op in words[done.computation_type.name]
        )
        for rank in sorted(order)
    )


class Stages(Work):
    """The passes of our executor."""

    def __init__(self, what: Job, modules: Mapping[str, Stage], links: Links) -> None:
        self.modules, self.links, self.rows = modules, links, what.rows
        self.last = str(len(what.graph.home) - 1)
        self.feed, self.targets = what.feed.split(what.rows), what.targets.split(what.rows)
        self.into = {edge.source: edge for edge in what.graph.edges}

    def forward(self, stage: str, microbatch: int, inputs: Mapping[Edge, Tensor]) -> Made:
        """One stage."""
        x = self.modules[stage](next(iter(inputs.values()), self.feed[microbatch]))
        if stage == self.last:
            return Made({}, self.modules[stage].loss(x, self.targets[microbatch]))
        return Made({self.into[stage]: x}, None)

    def post(self, action: Action, value: Tensor | None) -> Callable[[], Tensor | None]:
        """As in training."""
        return self.links.post(action, value, self.rows)


def placed(what: Job, lists: Lists) -> Schedule:
    """Everything else that is done around passes, as in training."""
    schedule = complete(what.graph, lists, split=what.kind in SPLIT)
    if faults := prove(schedule).text:
        raise RuntimeError(faults)
    return schedule


def ours(what: Job, modules: Mapping[str, Stage], lists: Lists, comm: C10dComm) -> Step:
    """A step of our executor."""
    mesh = mesh_of(PlanConfig(decoder=LayoutConfig(pp=RANKS)), comm)
    links = Links(mesh, what.graph, what.width, torch.float32, DEVICE)
    executor = Executor(placed(what, lists), mesh.position, Stages(what, modules, links), DEVICE)
    for module in modules.values() if executor.splits else ():
        attach(module, executor.late)
    return lambda: (executor.run(), None)[1]


def _cleared(step: Step, modules: Mapping[str, Stage]) -> Step:
    parameters = [param for module in modules.values() for param in module.parameters()]

    def whole() -> None:
        for param in parameters:
            param.grad = None
        step()

    return whole


def measured(step: Step, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of the processor in this process."""
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    used = time.process_time() - used
    dist.barrier()
    return (time.perf_counter() - start) / steps, used / steps


def alone(what: Job, modules: Mapping[str, Stage]) -> float:
    """Seconds of this rank's passes of a step without a pipeline, while the other ranks wait."""
    feed, targets = what.feed[: what.rows], what.targets[: what.rows]
    stream = torch.randn(what.rows, what.width)
    seconds = 0.0
    for rank in range(RANKS):
        dist.barrier()
        start = time.perf_counter()
        for name, module in modules.items() if rank == dist.get_rank() else ():
            for _ in range(SOME):
                x = feed if name == "0" else stream.clone().requires_grad_()
                y = module(x)
                last = int(name) == len(what.graph.home) - 1
                torch.autograd.backward(module.loss(y, targets) if last else y, None if last else stream)
        seconds = time.perf_counter() - start if rank == dist.get_rank() else seconds
    return seconds * MICROBATCHES / SOME


def difference(one: Mapping[str, Stage], other: Mapping[str, Stage]) -> float:
    """The largest of any gradient, as a share of that gradient's largest element, over all ranks."""
    pairs = [
        (_gradient(a), _gradient(b))
        for name in one
        for a, b in zip(one[name].parameters(), other[name].parameters(), strict=True)
    ]
    found = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
    worst = torch.tensor(max(found))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def _gradient(param: Tensor) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad


def compare(what: Job, comm: C10dComm, rounds: int) -> dict[str, Any]:
    """Both sides in turns; seconds of a step, and what bounds it."""
    modules = {"torch": what.modules(ours=False), "ours": what.modules(ours=True)}
    step, lists = theirs(what, modules["torch"])
    sides = {"torch": step, "ours": ours(what, modules["ours"], lists, comm)}
    if what.order != lists:
        modules["ours, own order"] = what.modules(ours=True)
        sides["ours, own order"] = ours(what, modules["ours, own order"], what.order, comm)
    steps = {side: _cleared(run, modules[side]) for side, run in sides.items()}
    for run in steps.values():
        run()
    gaps = [difference(modules[side], modules["torch"]) for side in sides if side != "torch"]
    if max(gaps) > EXACT:
        raise RuntimeError(f"{what.kind}, {what.work}: gradients differ by {max(gaps):.2e}")
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(rounds or ROUNDS[what.work]):
        for side in sorted(sides, reverse=bool(turn % 2)):
            times[side].append(measured(steps[side], STEPS[what.work]))
    passes = torch.zeros(RANKS)
    passes[dist.get_rank()] = min(alone(what, modules["ours"]) for _ in range(3))
    used = torch.tensor([statistics.median(cpu for _, cpu in times[side]) for side in sides])
    dist.all_reduce(passes)
    dist.all_reduce(used)
    walls = {side: statistics.median(wall for wall, _ in found) for side, found in times.items()}
    return {"gradients_differ": max(gaps)} | _told(what, lists, walls, used.tolist(), passes.tolist())


def _told(
    what: Job, lists: Lists, walls: dict[str, float], used: list[float], passes: list[float]
) -> dict[str, Any]:
    schedule = placed(what, lists)
    actions = [[a for a in own if a.op in ("F", "B", "W", "POST", "WAIT")] for own in schedule.lists]
    count = sum(map(len, actions))
    crossing = sum(map(schedule.graph.crosses, schedule.graph.edges))
    found: dict[str, Any] = {
        "ms": {side: 1e3 * wall for side, wall in walls.items()},
        "torch_over_ours": walls["torch"] / walls["ours"],
        "slowest_rank_alone_ms": 1e3 * max(passes),
        "all_ranks_over_cores_ms": 1e3 * sum(passes) / min(RANKS, os.cpu_count() or 1),
        "MB_over_edges": 2 * crossing * MICROBATCHES * what.rows * what.width * 4 / 1e6,
    }
    if what.work in PATTERNS:
        found["tokens_per_s"] = {side: len(what.feed) / wall for side, wall in walls.items()}
    if what.work == "paced":
        pace = PACE * RANKS / len(what.graph.home)
        found["simulated_ms"] = (
            1e3 * simulate(schedule, lambda done: pace if done.op in ("F", "B", "W") else 0.0).makespan
        )
    if what.work == "tiny":
        found["actions_of_a_rank"] = count / RANKS
        found["us_per_action"] = {side: 1e6 * wall * RANKS / count for side, wall in walls.items()}
        found["cpu_us_per_action"] = {side: 1e6 * cpu / count for side, cpu in zip(walls, used, strict=True)}
        found["cpu_us_per_action"]["passes alone"] = 1e6 * sum(passes) / count
    return found


def link_rate() -> float:
    """MB/s from one process to the next."""
    block = torch.zeros(2**22)
    seconds = []
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(block, 1)
        elif dist.get_rank() == 1:
            dist.recv(block, 0)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return block.nbytes / min(seconds) / 1e6


def work(kinds: list[str], works: list[str], rounds: int) -> dict[str, Any]:
    """One rank; the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    comm = C10dComm(timeout=60.0)
    found: dict[str, Any] = {}
    for kind in kinds:
        known = [name for name in works if name != "mlp" or kind in SPLIT]
        found[kind] = {name: compare(job(kind, name), comm, rounds) for name in known}
        found[kind]["link_MB_per_s"] = link_rate()
    dist.destroy_process_group()
    return found


def gang(kind: str, works: list[str], rounds: int) -> dict[str, Any]:
    """One kind in processes of its own; what fails is told."""
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [*script, __file__, "--kind", kind, "--rounds", str(rounds), "--works", *works]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return {"failed": "took longer than 300 s"}
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"failed": errors[0] if errors else done.stderr[-500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])[kind]


def table(found: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{'pipeline':12} {'work':8} {'ours, ms':>9} {'torch':>9} {'ratio':>6}  bounds, notes"]
    for kind, works in found.items():
        if "failed" in works:
            lines.append(f"{kind:12} failed: {works['failed']}")
            continue
        for name in (name for name in STEPS if name in works):
            own = works[name]
            bounds = (
                f"{own['slowest_rank_alone_ms']:.1f} slowest rank, {own['all_ranks_over_cores_ms']:.1f} all"
            )
            told = f"{kind:12} {name:8} {own['ms']['ours']:9.2f} {own['ms']['torch']:9.2f}"
            told += f" {own['torch_over_ours']:6.3f}  {bounds}"
            other = own["ms"].get("ours, own order")
            told += f"; own order {other:.2f}" if other else ""
            told += f"; simulated {own['simulated_ms']:.1f}" if "simulated_ms" in own else ""
            costs = own.get("cpu_us_per_action", {})
            told += "".join(f"; {side} {cost:.0f} us" for side, cost in costs.items())
            lines.append(told)
    return "\n".join(lines)


def main() -> None:
    """Run every kind, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=TORCH, help="only this one; write nothing")
    parser.add_argument(
        "--works", nargs="+", choices=STEPS, default=list(STEPS), help="only these; write nothing"
    )
    parser.add_argument("--rounds", type=int, default=0, help="of each kind of work; 0: as many as it needs")
    arguments = parser.parse_args()
    kinds = [arguments.kind] if arguments.kind else list(TORCH)
    if "RANK" in os.environ:
        found = work(kinds, arguments.works, arguments.rounds)
        if os.environ["RANK"] == "0":
            print(table(found), json.dumps(found), sep="\n")
    else:
        found = {kind: gang(kind, arguments.works, arguments.rounds) for kind in kinds}
        print(table(found))
    whole = kinds == list(TORCH) and arguments.works == list(STEPS)
    if whole and os.environ.get("RANK", "0") == "0":
        result = {"pipelines": found, "environment": environment(DEVICE)}
        text = json.dumps(result, indent=1) + "\n"
        Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
