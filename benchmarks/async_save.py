"""How long a background save keeps training waiting, and what it costs the steps beside it.

One process trains the model of ``stdlib_lm`` on random tokens, in steps of at least half a second. Reported:
the time until a save returns to the training loop, and how much longer the steps are while the files are
written, both as shares of a step; and for comparison the time of a save in the foreground.

    python benchmarks/async_save.py            # writes benchmarks/async_save.json
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from weft.build.model import assemble
from weft.data.batch import Batch
from weft.ops.memory import keep_freed_memory
from weft.parallel.comm import SingleComm
from weft.parallel.mesh import mesh_of
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.run import RunConfig
from weft.train.environment import environment
from weft.train.loop import Trainer
from weft.train.saving import Saving
from weft.train.team import decoder_only

SAMPLES, LENGTH, ROUNDS = 8, 512, 7
LIMIT = 0.05


class Tokens:
    """Random tokens."""

    def __init__(self, depths: int, vocab: int) -> None:
        self.depths, self.vocab = depths, vocab

    def microbatch(self, start: int, count: int) -> Batch:
        """Samples of one document each."""
        rng = np.random.default_rng(start)
        tokens = rng.integers(0, self.vocab, count * LENGTH)
        future = rng.integers(0, self.vocab, (self.depths + 1, count * LENGTH))
        mask = np.ones_like(future, dtype=bool)
        return Batch(tokens, future, mask, (LENGTH,) * count, tuple(range(start, start + count)))

    def state(self, samples: int) -> dict[str, int]:
        """The position."""
        return {"samples": samples}


def settings(directory: str, background: bool) -> RunConfig:
    """The recipe with steps of half a second or more."""
    config = stdlib_lm()
    return replace(
        config,
        run=replace(config.run, dir=directory),
        train=replace(config.train, global_batch_size=SAMPLES, micro_batch_size=8),
        checkpoint=replace(config.checkpoint, load="", async_save=background, most_recent_k=1),
    )


def main() -> None:
    """Measure, print, and write the figures."""
    torch.set_num_threads(2)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        config = settings(directory, background=True)
        mesh = mesh_of(config.plan, SingleComm())
        model = assemble(config.model, "fp32", torch.device("cpu"), 0, mesh)
        tokens = Tokens(config.model.depths, config.model.vocab_size)
        trainer = Trainer(config, decoder_only(model, mesh), tokens)
        saving = Saving(config, mesh.comm)
        step = 0

        def train() -> float:
            nonlocal step
            step += 1
            return trainer.step(step, trainer.batches(trainer.samples))["seconds"] - sum(seconds)

        seconds: list[float] = []
        blocked, beside = [], []
        for _ in range(2):
            seconds.append(train())
        plain = []
        for _ in range(ROUNDS):
            plain.append(train())
            seconds.append(plain[-1])
            start = time.perf_counter()
            saving.save(step, trainer)
            blocked.append(time.perf_counter() - start)
            beside.append(train())
            seconds.append(beside[-1])
            saving.close()
        size = sum(file.stat().st_size for file in Path(directory).rglob("*.safetensors"))
        foreground = Saving(settings(f"{directory}/foreground", background=False), mesh.comm)
        start = time.perf_counter()
        foreground.save(step, trainer)
        front = time.perf_counter() - start
    usual = statistics.median(plain)
    result = {
        "step_seconds": usual,
        "blocked_seconds": statistics.median(blocked),
        "blocked_share": statistics.median(blocked) / usual,
        "slower_step_beside_it": statistics.median(beside) / usual - 1,
        "foreground_seconds": front,
        "mib": size / 2**20,
        "limit": LIMIT,
    }
    print(json.dumps(result, indent=1))
    result["environment"] = environment(torch.device("cpu"))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
