"""A training run from its config to its report."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from weft.build.model import drawn
from weft.checkpoint.hf import export_hf
from weft.checkpoint.model import load_model
from weft.config.errors import ConfigError, Problem
from weft.config.load import to_dict, to_yaml
from weft.data.batch import Batch
from weft.data.packed import PackedSplit
from weft.data.prefetch import prefetch
from weft.data.stream import Split
from weft.models.hf_hybrid import unpublishable
from weft.ops.memory import keep_freed_memory
from weft.parallel.comm import Comm
from weft.parallel.launch import connected
from weft.parallel.together import on_chief, on_every
from weft.parallel.watchdog import Watchdog
from weft.plan.check import check_run, executable
from weft.plan.modules_table import module_table
from weft.plan.plans import plans_of_run
from weft.plan.step import step_of
from weft.spec.count import count, count_parts
from weft.spec.precision import PRECISIONS
from weft.spec.run import RunConfig
from weft.train.answers import Answers, write_answers
from weft.train.environment import environment
from weft.train.evaluate import Evaluation, evaluate
from weft.train.flops import measure_peak, utilization
from weft.train.loop import NotFinite, Trainer
from weft.train.metrics import Metrics, replace_text, write_json
from weft.train.progress import Progress, show_summary
from weft.train.report import write_report
from weft.train.report_answers import left_out
from weft.train.sample import sample
from weft.train.saving import Saving
from weft.train.source import Source, open_source
from weft.train.team import assembled
from weft.train.timeline import Part, compare, part, write_timelines

SAMPLED_PARAMETERS = 10**9  # of a model that ranks share, the most that one of them loads to show a sample


def pick_device(config: RunConfig) -> torch.device:
    """The device of ``run.device``.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if config.run.device == "cuda" and not cuda:
        raise ConfigError([Problem("run.device", "cuda, but torch sees no CUDA device; use cpu or auto")])
    return torch.device("cuda" if cuda and config.run.device != "cpu" else "cpu")


def check_plan(config: RunConfig, world: int) -> None:
    """Refuse a plan that does not fit the model and the ranks, or that this version does not run.

    Raises:
        ConfigError: every problem at once.
    """
    problems = check_run(config, world) or executable(plans_of_run(config, world).decoder)
    if problems:
        raise ConfigError(problems)


def train(config: RunConfig, origins: dict[str, str]) -> Path:
    """Train, evaluate, export and report; returns the run directory.

    Every rank calls this; only rank 0 writes.
    """
    device = pick_device(config)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    keep_freed_memory()
    if config.run.deterministic != torch.are_deterministic_algorithms_enabled():  # the call itself is slow
        torch.use_deterministic_algorithms(config.run.deterministic)
    run = config.run
    with connected(device) as comm, Watchdog(comm.rank, comm.size, run.watchdog, run.stall) as watchdog:
        return Run(config, origins, comm, device, watchdog.beat).execute()


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


class Run:
    """One rank's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        origins: dict[str, str],
        comm: Comm,
        device: torch.device,
        beat: Callable[[int, str], None],
    ) -> None:
        self.config, self.comm, self.device, self.beat = config, comm, device, beat
        check_plan(config, comm.size)
        self.plans = plans_of_run(config, comm.size)
        self.dir = config.directory
        self.chief = comm.rank == 0
        self.peak = 0.0
        self.saving = Saving(config, comm)
        self.corpus = self._corpus()
        if self.corpus.tokenizer:
            self.saving.tokenizer = self.corpus.tokenizer.fingerprint
        self.saving.check()
        values = drawn(config.run.seed)
        team = assembled(self.plans, config.modules, comm, config.train.precision, device, values)
        loader = self.corpus.loader(config, self.saving.position())
        self.trainer = Trainer(config, team, loader, self.corpus.fetch)
        self.first = self.saving.restore(self.trainer)
        if self.chief:
            self._tell(loader.changes)
        if not self.finished:
            on_chief(comm, lambda: self._write_settings(origins))

    @property
    def finished(self) -> bool:
        """Whether the run was resumed with nothing left to do, its results included."""
        return self.first >= self.config.train.train_iters and (self.dir / "summary.json").is_file()

    def _corpus(self) -> Source:
        """Rank 0 tokenizes; the others find its work in the cache. A resumed run keeps its tokenizer."""
        data, kept = self.config.data, self.saving.kept_tokenizer()
        if kept and not data.tokenizer.path:
            data = replace(data, tokenizer=replace(data.tokenizer, path=str(kept)))
        build = partial(open_source, self.config, data)
        built: list[Source] = []
        on_chief(self.comm, lambda: built.append(build(_say)))
        on_every(self.comm, lambda: None if built else built.append(build()))
        return built[0]

    def _tell(self, changes: list[str]) -> None:
        source, last = self.saving.source, self.config.train.train_iters
        for change in changes:
            _say(change)
        for problem in self._unpublishable():
            _say(f"no Hugging Face export of this run: {problem}")
        for name, reasons in self._skipped().items():
            _say(f"{name}: {left_out(reasons)}")
        if source is None:
            return
        left = last - self.first
        rest = f"{left} steps to go" if left > 0 else "nothing left to train; set run.dir for a new run"
        _say(f"resumed from {source.path} at step {self.first} of {last}: {rest}")
        for change in self.saving.changes():
            _say(f"  changed since then: {change}")

    def _skipped(self) -> dict[str, dict[str, int]]:
        """Samples left out, by split and reason."""
        splits = {name: s for name, s in self.corpus.splits.items() if isinstance(s, PackedSplit)}
        return {name: split.skipped for name, split in splits.items() if split.skipped}

    def _unpublishable(self) -> list[str]:
        if self.config.encoders:
            return ["encoders are kept in checkpoints only by this version"]
        return [f"model.{problem}" for problem in unpublishable(self.config.model)]

    def _write_settings(self, origins: dict[str, str]) -> None:
        replace_text(self.dir / "config.yaml", to_yaml(self.config))
        replace_text(self.dir / "plan.yaml", to_yaml(self.config.plan))
        write_json(self.dir / "origins.json", origins)
        write_json(self.dir / "environment.json", environment(self.device))
        for name, kept in (("hf", self.saving.beside("hf")), ("tokenizer", self.saving.beside("tokenizer"))):
            if kept and not (self.dir / name).exists():
                shutil.copytree(kept, self.dir / name)
        if self.corpus.tokenizer and not (self.dir / "tokenizer").exists():
            self.corpus.tokenizer.save(self.dir / "tokenizer")

    def execute(self) -> Path:
        """The loop, then the closing evaluation, sample, report and export."""
        if self.finished:
            if self.chief:
                show_summary(json.loads((self.dir / "summary.json").read_text(encoding="utf-8")))
            return self.dir
        try:
            with self._followers() as follow, closing(prefetch(self._steps())) as batches:
                done = self._loop(batches, follow)
            self.beat(done, "saving")
            self.saving.save(done, self.trainer, final=True)
        finally:
            self.saving.close()
        return self._finish()

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

    def _loop(self, batches: Iterator[list[Batch]], follow: Callable[[dict[str, Any]], None]) -> int:
        """All steps that are left; the number of the last one."""
        iteration, began = self.first, time.perf_counter()
        self._measure_peak()
        while iteration < self.config.train.train_iters and not self._out_of_time(began):
            iteration += 1
            self.beat(iteration, "training")
            try:
                row = self.trainer.next_step(iteration, batches)
            except NotFinite as error:
                follow(error.row)
                if self.chief:
                    write_report(self.dir)
                raise
            peak = self.peak * self.comm.size
            row["mfu"] = utilization(row["tokens_per_second"], row["flops_per_token"], peak)
            self._between(iteration, row)
            follow(row)
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
            row |= self._told(self._evaluate(self.corpus.splits["valid"], config.validation.eval_iters))
            self._measure_peak()
        self.beat(iteration, "saving")
        self.saving.maybe(iteration, self.trainer)

    def _measure_peak(self) -> None:
        """FLOP/s of this rank's device; the best of several moments, for other work only ever slows one."""
        dtype: torch.dtype = getattr(torch, PRECISIONS[self.config.train.precision].params)
        told = self.config.logger.peak_flops
        self.peak = told or max(self.peak, measure_peak(self.device, dtype))

    def _evaluate(self, split: Split | PackedSplit, limit: int = 0) -> Evaluation:
        """A split, or ``limit`` microbatches of it, read by all ranks; a collective call."""
        config = self.config
        team, grid = self.trainer.team, self.plans.decoder
        windows = (
            split.windows(
                config.data.seq_length,
                config.model.depths,
                config.train.micro_batch_size * grid.readers,
                part=team.decoder.mesh.reader,
                parts=team.decoder.mesh.layout.readers,
                limit=limit * config.train.micro_batch_size,
            )
            if team.decoder
            else ()
        )
        graded, chunk = self.corpus.graded, config.train.loss_chunk
        return evaluate(team, self._beating(windows), chunk, self.corpus.fetch, graded)

    def _told(self, result: Evaluation) -> dict[str, Any]:
        """What a row says of an evaluation of the validation split."""
        split = self.corpus.splits["valid"]
        bits = result.bits_per_byte(split.tokens, split.bytes)
        told = {"valid_loss": result.loss, "valid_bits_per_byte": bits, "valid_tokens": result.tokens}
        return told | ({"valid_accuracy": result.accuracy} if self.corpus.graded else {})

    def _beating(self, windows: Iterable[Batch]) -> Iterator[Batch]:
        """The same windows; each one taken shows that this rank gets on."""
        for window in windows:
            self.beat(self.trainer.steps, "evaluation")
            yield window

    def _out_of_time(self, began: float) -> bool:
        """Whether any rank has trained for longer than asked."""
        limit = self.config.train.exit_duration_in_mins * 60
        return bool(limit) and any(self.comm.gather_objects(time.perf_counter() - began > limit))

    def _finish(self) -> Path:
        split = self.corpus.splits.get("valid")
        valid = self._evaluate(split) if split else None
        answers = self._answers(valid) if valid else None
        self.beat(self.trainer.steps, "closing")
        trainer = self.trainer
        first = trainer.team.rank == self.plans.seats[trainer.team.seat][0]
        told = self.config.plan.schedule.trace and first and trainer.spans
        parts = self.comm.gather_objects(part(trainer.spans, trainer.executor.peak) if told else None)
        on_chief(self.comm, lambda: self._close(valid, answers, [own for own in parts if own]))
        return self.dir

    def _answers(self, valid: Evaluation) -> Answers | None:
        """Of data that has answers; a collective call."""
        split = self.corpus.splits["valid"]
        if not self.corpus.graded or not isinstance(split, PackedSplit):
            return None
        other = split.shuffled(self.config.run.seed)
        return Answers(split, valid, other, self._evaluate(other)) if other.swaps else Answers(split, valid)

    def _close(self, valid: Evaluation | None, answers: Answers | None, parts: list[Part]) -> None:
        """Summary and report first, so that an export that fails loses neither."""
        exports = self.config.checkpoint.save and not self._unpublishable()
        summary = self._summary(valid, exports)
        if answers:
            train, tokenizer = self.corpus.splits["train"], self.corpus.tokenizer
            summary["answers"] = write_answers(self.dir, answers, self.config, train, tokenizer)
        write_json(self.dir / "summary.json", summary)
        if parts:
            self._write_timelines(parts)
        write_report(self.dir)
        show_summary(summary)
        if exports:
            export_hf(self.dir, self.dir / "export")

    def _write_timelines(self, parts: list[Part]) -> None:
        """The last step as it ran, and simulated with the costs that were measured."""
        config, trainer = self.config.plan.schedule, self.trainer
        ran = step_of(self.plans, self.config.modules, config, trainer.microbatches)
        write_timelines(self.dir, trainer.steps, config.file or config.kind, compare(parts, *ran))

    def _sample(self) -> dict[str, str]:
        """Text that the model makes: of the model in memory, or of its checkpoint where ranks share it."""
        layout, config, lm = self.plans.decoder.dense, self.config, self.trainer.team.lm
        if config.encoders:  # generation takes text alone so far
            return {}
        whole = layout.plane.size == 1 and layout.grid.size("pp") == 1
        if lm and whole and layout.store.level < 3:
            return sample(lm, self.corpus.tokenizer, config)
        if not config.checkpoint.save or count(config.model).total > SAMPLED_PARAMETERS:
            return {}
        model, _ = load_model(self.dir, config.train.precision, self.device)
        return sample(model, self.corpus.tokenizer, config)

    def _plan(self) -> dict[str, Any]:
        """Where each module lies, as a table."""
        table = module_table(self.config, self.plans)
        return {"ranks": self.comm.size, "head": table.head, "rows": table.rows}

    def _summary(self, valid: Evaluation | None, exports: bool) -> dict[str, Any]:
        config, split = self.config, self.corpus.splits.get("valid")
        counts, total = count(config.model), sum(count_parts(config.modules).values())
        paths = {"report": self.dir / "report.html"}
        if config.checkpoint.save:
            paths["checkpoint"] = self.saving.root
        if exports:
            paths["export"] = self.dir / "export"
        summary = {
            "name": config.run.name,
            "params": total,
            "active_params": total - counts.total + counts.active,
            "flops_per_token": self.trainer.flops_per_token,
            "tokens": self.trainer.tokens,
            "seconds": self.trainer.seconds,
            "sample": self._sample(),
            "plan": self._plan(),
            "paths": {name: str(path) for name, path in paths.items()},
        }
        if skipped := self._skipped():
            summary["skipped"] = skipped
        if split and valid:
            bits = valid.bits_per_byte(split.tokens, split.bytes)
            told = {"loss": valid.loss, "bits_per_byte": bits, "bytes": split.bytes, "tokens": valid.tokens}
            summary |= {"valid": told, "baselines": split.baselines}
        return summary
