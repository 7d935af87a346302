"""Samples per second of ``digits_vlm`` with a heavier encoder on four processes, plan by plan.

Homogeneous plans lay encoder and decoder out alike; heterogeneous ones do not. Each plan runs in fresh
processes of one thread, in turns; a figure is the median over the steps of all turns after the first few.

    python benchmarks/multimodal.py            # writes benchmarks/multimodal.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from weft.train.environment import environment

RANKS, STEPS, WARM, ROUNDS, TOKENS = 4, 44, 4, 2, 15  # tokens of a sample: every digit has as many
HEAVY = ("num_hidden_layers=8", "hidden_size=192", "intermediate_size=768")
PLANS = {
    "homogeneous dp 4": ("plan.vision.dp=4", "plan.decoder.dp=4"),
    "homogeneous tp 2 dp 2": ("plan.vision.tp=2", "plan.decoder.tp=2"),
    "homogeneous tp 4": ("plan.vision.tp=4", "plan.decoder.tp=4"),
    "encoder dp 4, decoder tp 2 dp 2": ("plan.vision.dp=4", "plan.decoder.tp=2"),
    "encoder dp 4, decoder pp 2 dp 2, in bubbles": (
        "plan.vision.dp=4",
        "plan.decoder.pp=2",
        "plan.schedule.encoder_order=bubble",
        "plan.schedule.encoder_groups_in_flight=4",
    ),
    "encoder on 3 ranks, decoder on 1 other": ("plan.vision.ranks=0-2", "plan.decoder.ranks=3-3"),
}


def measure(plan: tuple[str, ...], cache: Path) -> list[float]:
    """Seconds of every step after the first few."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *(f"encoders.vision.{word}" for word in HEAVY),
            *plan,
            f"run.dir={folder}/run",
            f"data.cache={cache}",
            f"train.train_iters={STEPS}",
            "train.micro_batch_size=3",
            "scheduler.lr_warmup_iters=2",
            "checkpoint.save=false",
            "checkpoint.load=",
            "validation.eval_interval=0",
            "data.valid_fraction=0.02",
        ]
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "-m", "weft"]
        subprocess.run(
            [*launch, "train", "digits_vlm", *settings],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["tokens_per_second"] / TOKENS for row in rows if row["step"] > WARM]


def main() -> None:
    """Measure, print, and write the figures."""
    found: dict[str, list[float]] = {name: [] for name in PLANS}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(ROUNDS):
            for name, plan in PLANS.items():
                found[name] += measure(plan, Path(cache))
    speeds = {name: statistics.median(values) for name, values in found.items()}
    alike = {name: speed for name, speed in speeds.items() if name.startswith("homogeneous")}
    others = {name: speed for name, speed in speeds.items() if name not in alike}
    best, apart = max(alike, key=lambda name: alike[name]), max(others, key=lambda name: others[name])
    result = {
        "samples_per_second": speeds,
        "best_homogeneous": best,
        "best_heterogeneous": apart,
        "ratio": others[apart] / alike[best],
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
