"""A training run from its config to its report."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from weft.build.model import assemble
from weft.checkpoint.hf import export_hf
from weft.config.errors import ConfigError, Problem
from weft.config.load import to_dict, to_yaml
from weft.data.batch import Batch
from weft.data.corpus import Corpus, build_corpus
from weft.data.order import Loader
from weft.data.prefetch import prefetch
from weft.ops.memory import keep_freed_memory
from weft.parallel.comm import Comm
from weft.parallel.launch import connected
from weft.spec.count import count, mean_context, training_flops_per_token
from weft.spec.run import RunConfig
from weft.train.environment import environment
from weft.train.evaluate import evaluate
from weft.train.flops import measure_peak, utilization
from weft.train.loop import Trainer
from weft.train.metrics import Metrics, write_json
from weft.train.progress import Progress, show_summary
from weft.train.report import write_report
from weft.train.sample import sample
from weft.train.saving import Saving


def pick_device(config: RunConfig) -> torch.device:
    """The device of ``run.device``.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if config.run.device == "cuda" and not cuda:
        raise ConfigError([Problem("run.device", "cuda, but torch sees no CUDA device; use cpu or auto")])
    return torch.device("cuda" if cuda and config.run.device != "cpu" else "cpu")


def train(config: RunConfig, origins: dict[str, str]) -> Path:
    """Train, evaluate, export and report; returns the run directory.

    Every rank calls this; only rank 0 writes.
    """
    device = pick_device(config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    keep_freed_memory()
    torch.use_deterministic_algorithms(config.run.deterministic)
    with connected(device) as comm:
        _check_ranks(config, comm)
        return Run(config, origins, comm, device).execute()


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _check_ranks(config: RunConfig, comm: Comm) -> None:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro * comm.size):
        message = (
            f"{batch} sequences cannot be shared by {comm.size} ranks in microbatches of {micro}; make it a "
            f"multiple of {micro * comm.size} or change train.micro_batch_size"
        )
        raise ConfigError([Problem("train.global_batch_size", message)])


class Run:
    """One rank's part of a run."""

    def __init__(self, config: RunConfig, origins: dict[str, str], comm: Comm, device: torch.device) -> None:
        self.config, self.comm, self.device = config, comm, device
        self.dir = config.directory
        self.chief = comm.rank == 0
        self.corpus = self._corpus()
        self._check_vocabulary()
        model = assemble(config.model, config.train.precision, device, config.run.seed)
        data = config.data
        self.saving = Saving(config, self.dir, comm)
        position = self.saving.position()
        loader = Loader(
            self.corpus.splits["train"], data.seq_length, config.model.depths, config.run.seed, position
        )
        for change in loader.changes if self.chief else ():
            _say(change)
        self.trainer = Trainer(config, model, loader, comm)
        self.first = self.saving.restore(self.trainer)
        if self.chief:
            self._tell_resumed()
            self._write_settings(origins)
        comm.barrier()

    def _corpus(self) -> Corpus:
        """Rank 0 tokenizes; the others find its work in the cache."""
        build = partial(build_corpus, self.config.data, self.config.model.vocab_size, self.config.cache)
        corpus = build(_say) if self.chief else None
        self.comm.barrier()
        return corpus or build()

    def _check_vocabulary(self) -> None:
        if self.corpus.tokenizer is None:
            return
        has, fits = self.corpus.tokenizer.vocab_size, self.config.model.vocab_size
        if has > fits:
            message = f"{fits}, but the tokenizer has {has} tokens; raise it to at least {has}"
            raise ConfigError([Problem("model.vocab_size", message)])

    def _tell_resumed(self) -> None:
        source, last = self.saving.source, self.config.train.train_iters
        if source is None:
            return
        left = last - self.first
        rest = f"{left} steps to go" if left > 0 else "nothing left to train; set run.dir for a new run"
        _say(f"resumed from {source.path} at step {self.first} of {last}: {rest}")

    def _write_settings(self, origins: dict[str, str]) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "config.yaml").write_text(to_yaml(self.config))
        write_json(self.dir / "origins.json", origins)
        write_json(self.dir / "environment.json", environment(self.device))
        if self.corpus.tokenizer:
            self.corpus.tokenizer.save(self.dir / "tokenizer")

    def execute(self) -> Path:
        """The loop, then the closing evaluation, sample, export and report."""
        config = self.config
        flops = training_flops_per_token(config.model, mean_context((config.data.seq_length,)))
        with self._followers() as follow, closing(prefetch(self._steps())) as batches:
            done = self._loop(batches, follow, flops)
        self.saving.save(done, self.trainer, final=True)
        return self._finish(flops)

    @contextmanager
    def _followers(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """What takes the row of each step: metrics and display on rank 0, nothing elsewhere."""
        if not self.chief:
            yield lambda row: None
            return
        config = self.config
        shown = Progress(config.run.name, config.train.train_iters, config.logger.log_interval, self.first)
        with Metrics(self.dir, config.logger, self.first, to_dict(config)) as metrics, shown as progress:

            def follow(row: dict[str, Any]) -> None:
                metrics.log(row)
                progress.update(row)

            yield follow

    def _loop(
        self, batches: Iterator[list[Batch]], follow: Callable[[dict[str, Any]], None], flops: float
    ) -> int:
        """All steps that are left; the number of the last one."""
        config, iteration = self.config, self.first
        dtype = self.trainer.model.embed.weight.dtype
        peak = (config.logger.peak_flops or measure_peak(self.device, dtype)) * self.comm.size
        began = time.perf_counter()
        for iteration, share in enumerate(batches, self.first + 1):
            row = self.trainer.step(iteration, share)
            row["mfu"] = utilization(row["tokens_per_second"], flops, peak)
            self._between(iteration, row)
            follow(row)
            if self._out_of_time(began):
                break
        return iteration

    def _steps(self) -> Iterator[list[Batch]]:
        samples = self.trainer.samples
        for _ in range(self.first, self.config.train.train_iters):
            yield self.trainer.batches(samples)
            samples += self.config.train.global_batch_size

    def _between(self, iteration: int, row: dict[str, Any]) -> None:
        """What happens between steps: evaluation and checkpoints."""
        config = self.config
        every = config.validation.eval_interval
        if (
            every
            and iteration % every == 0
            and iteration < config.train.train_iters
            and "valid" in self.corpus.splits
        ):
            row |= self._evaluate(config.validation.eval_iters)
        self.saving.maybe(iteration, self.trainer)

    def _evaluate(self, limit: int = 0) -> dict[str, Any]:
        config, split = self.config, self.corpus.splits["valid"]
        windows = split.windows(
            config.data.seq_length,
            config.model.depths,
            config.train.micro_batch_size,
            part=self.comm.rank,
            parts=self.comm.size,
            limit=limit,
        )
        result = evaluate(self.trainer.model, windows, self.comm, config.train.loss_chunk)
        bits = result.bits_per_byte(split.tokens, split.bytes)
        return {"valid_loss": result.loss, "valid_bits_per_byte": bits, "valid_tokens": result.tokens}

    def _out_of_time(self, began: float) -> bool:
        """Whether any rank has trained for longer than asked."""
        limit = self.config.train.exit_duration_in_mins * 60
        return bool(limit) and any(self.comm.gather_objects(time.perf_counter() - began > limit))

    def _finish(self, flops: float) -> Path:
        valid = self._evaluate() if "valid" in self.corpus.splits else {}
        if self.chief:
            summary = self._summary(flops, valid)
            write_json(self.dir / "summary.json", summary)
            if self.config.checkpoint.save:
                export_hf(self.dir, self.dir / "export")
            write_report(self.dir)
            show_summary(summary)
        self.comm.barrier()
        return self.dir

    def _summary(self, flops: float, valid: dict[str, Any]) -> dict[str, Any]:
        config, split = self.config, self.corpus.splits.get("valid")
        counts = count(config.model)
        paths = {"report": self.dir / "report.html"}
        if config.checkpoint.save:
            paths |= {"export": self.dir / "export", "checkpoint": self.dir / "checkpoints"}
        summary = {
            "name": config.run.name,
            "params": counts.total,
            "active_params": counts.active,
            "flops_per_token": flops,
            "tokens": self.trainer.tokens,
            "seconds": self.trainer.seconds,
            "sample": sample(self.trainer.model, self.corpus.tokenizer, config),
            "paths": {name: str(path) for name, path in paths.items()},
        }
        if split and valid:
            bits, tokens = valid["valid_bits_per_byte"], valid["valid_tokens"]
            summary["valid"] = {"bits_per_byte": bits, "bytes": split.bytes, "tokens": tokens}
            summary["baselines"] = split.baselines
        return summary
