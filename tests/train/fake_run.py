"""A made-up but realistic run directory: ``python tests/train/fake_run.py DIR``."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from weft.spec.run import OptimizerConfig, SchedulerConfig
from weft.train.metrics import write_json
from weft.train.schedule import learning_rate

CONFIG = """\
run: {name: stdlib_lm, dir: runs/stdlib_lm, seed: 1234, device: auto, threads: 2}
model: {pattern: MEM*E-ME/*E, vocab_size: 4096, hidden_size: 192, n_routed_experts: 32,
  num_experts_per_tok: 4, moe_latent_size: 64, time_step_limit: [0.0, .inf]}
data: {source: stdlib, seq_length: 512, tokenizer: {vocab_size: 4096}}
train: {train_iters: %d, global_batch_size: 8, micro_batch_size: 8, precision: fp32}
validation: {eval_interval: 50, eval_iters: 8}
optimizer: {lr: 0.003, min_lr: 3.0e-05, clip_grad: 1.0}
scheduler: {lr_decay_style: WSD, lr_warmup_iters: 40, lr_wsd_decay_style: minus_sqrt}
"""
SAMPLE = {
    "prompt": "def read_lines(path):\n",
    "text": '    """Return the lines of *path*."""\n    with open(path, "rb") as file:\n'
    "        return [line.rstrip() for line in file if not line.startswith(b'#')]\n\n\n"
    "class Reader:\n    def __init__(self, stream, encoding=None):\n        self.stream = stream <b>\n",
}


def fake_rows(
    steps: int, iters: int, units: tuple[str, ...] = ("layers.1", "layers.4", "layers.7", "mtp.0")
) -> list[dict]:
    """Rows as a healthy run writes them; one expert of the second unit dies, the load evens out over time."""
    random, rows = np.random.default_rng(7), []
    optimizer = OptimizerConfig(lr=3e-3, min_lr=3e-5)
    scheduler = SchedulerConfig(lr_warmup_iters=40)
    taste = {unit: random.normal(0, 0.9, 32) for unit in units}
    seconds = 0.0
    for step in range(1, steps + 1):
        decay = 0.12 * max(0.0, step / iters - 0.8)
        lm = 1.55 + 6.8 * (1 + step / 9) ** -0.62 - 3 * decay + random.normal(0, 0.06)
        mtp, aux = lm + 0.75 + random.normal(0, 0.05), 0.004 + 0.01 * math.exp(-step / 60)
        speed = 15800 + 400 * random.normal() - (5200 if step % 50 == 0 else 0) - (6000 if step == 1 else 0)
        seconds += 4096 / speed
        row: dict[str, Any] = {
            "step": step,
            "loss": lm + 0.3 * mtp + aux,
            "lm_loss": lm,
            "mtp_loss": mtp,
            "aux_loss": aux,
        }
        row |= {"grad_norm": float((0.4 + 3 * math.exp(-step / 25)) * random.lognormal(0, 0.25))}
        row |= {
            "lr": learning_rate(step, optimizer, scheduler, iters),
            "tokens": 4096 * step,
            "samples": 8 * step,
        }
        row |= {
            "tokens_per_second": speed,
            "mfu": speed / 40_000,
            "seconds": seconds,
            "memory_gib": 1.1 + min(step, 60) / 200,
        }
        if units:
            loads = {unit: _load(taste[unit], step, index, random) for index, unit in enumerate(units)}
            row["expert_load"] = loads
            row["expert_load_max"] = max(max(load) * len(load) for load in loads.values())
            row["router_entropy"] = {
                unit: 1.6 + 1.5 * math.exp(-step / 200) + 0.1 * i for i, unit in enumerate(units)
            }
        if step % 50 == 0 or step == iters:
            row |= {"valid_loss": lm + 0.05, "valid_bits_per_byte": (lm + 0.05) / math.log(2) * 0.4012}
        rows.append(row)
    return rows


def _load(taste: np.ndarray, step: int, index: int, random: np.random.Generator) -> list[float]:
    logits = taste * (0.25 + 1.2 * math.exp(-step / 70)) + random.normal(0, 0.08, taste.size)
    share = np.exp(logits) / np.exp(logits).sum()
    if index == 1 and step > 150:
        share[5] = 0.0
    return (share / share.sum()).round(6).tolist()


def write_run(
    run_dir: Path, steps: int = 600, iters: int = 600, moe: bool = True, finished: bool = True
) -> Path:
    """Write the files of a run; only a finished one has summary.json and environment.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(CONFIG % iters, encoding="utf-8")
    origins = {
        "train.train_iters": "command line",
        "model.pattern": "recipe stdlib_lm",
        "run.seed": "default",
    }
    write_json(run_dir / "origins.json", origins)
    rows = fake_rows(steps, iters) if moe else fake_rows(steps, iters, units=())
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if finished:
        write_json(run_dir / "summary.json", fake_summary(rows[-1]))
        facts = {
            "weft": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "cpu": "Example CPU @ 2.60GHz",
            "threads": 2,
        }
        write_json(run_dir / "environment.json", facts)
    return run_dir


def fake_summary(last: dict[str, Any]) -> dict[str, Any]:
    """summary.json of a finished run."""
    return {
        "name": "stdlib_lm", "params": 5_412_096, "active_params": 2_104_320, "flops_per_token": 17.9e6,
        "tokens": last["tokens"], "seconds": last["seconds"],
        "valid": {"bits_per_byte": last.get("valid_bits_per_byte", 1.5), "bytes": 402_113, "tokens": 161_328},
        "baselines": {"unigram": 2.871, "zlib": 1.604, "lzma": 1.372},
        "sample": SAMPLE,
        "paths": {"report": "runs/stdlib_lm/report.html", "export": "runs/stdlib_lm/export",
                  "checkpoint": "runs/stdlib_lm/checkpoints/step_0000600"},
    }  # fmt: skip


if __name__ == "__main__":
    write_run(Path(sys.argv[1]))
