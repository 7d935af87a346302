"""A whole run, as one frozen tree."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weft.config.base import Config, setting
from weft.config.errors import Problem
from weft.config.suggest import did_you_mean
from weft.spec.audio import AudioConfig
from weft.spec.data import DataConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import PlanConfig
from weft.spec.modules import DECODER, FORM, RESERVED, Modules
from weft.spec.vision import VisionConfig


@dataclass(frozen=True, kw_only=True)
class RunSettings(Config):
    """Where and how the run happens."""

    name: str = setting("run", "name of the run, shown in reports and trackers")
    dir: str = setting("", "run directory; empty is runs/<name>")
    seed: int = setting(1234, "seed of initialization and data order", ge=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes CUDA where there is a device")
    threads: int = setting(0, "CPU threads of this process; 0 leaves torch's choice", ge=0)
    deterministic: bool = setting(False, "refuse operations that are not deterministic on the device")
    watchdog: float = setting(
        10.0, "seconds of silence after which a rank counts as lost and the run stops; 0 is off", ge=0
    )
    stall: float = setting(
        1800.0,
        "seconds without a step, a save or a microbatch of evaluation on any rank after which the run stops "
        "and prints every rank's stacks; 0 is off",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """The training loop."""

    train_iters: int = setting(1000, "optimizer steps", ge=1)
    global_batch_size: int = setting(8, "sequences per optimizer step, all ranks together", ge=1)
    micro_batch_size: int = setting(8, "most sequences per forward pass of one reader", ge=1)
    precision: Literal["fp64", "fp32", "bf16"] = setting(
        "fp32", "parameters and arithmetic; bf16 keeps fp32 master weights, gradients, router and SSM state"
    )
    recompute: bool = setting(False, "recompute layers in the backward pass instead of keeping activations")
    freeze: tuple[str, ...] = setting(
        (), "what is not trained: decoder, an encoder, or a part of one: vision.body, vision.projector"
    )
    loss_chunk: int = setting(1024, "tokens whose logits exist at a time", ge=1)
    exit_duration_in_mins: float = setting(
        0.0, "stop (with a checkpoint) after this many minutes of training; 0 is never", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """Evaluation in bits per byte."""

    eval_interval: int = setting(100, "steps between evaluations; 0 evaluates only at the end", ge=0)
    eval_iters: int = setting(
        8, "microbatches per evaluation while training; the last one reads everything", ge=1
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019). Norms, biases and per-head scalars do not decay."""

    lr: float = setting(1e-3, "peak learning rate", gt=0)
    min_lr: float = setting(1e-5, "final learning rate", ge=0)
    beta1: float = setting(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = setting(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = setting(0.1, "decoupled weight decay", ge=0)
    clip_grad: float = setting(1.0, "largest global gradient norm; 0 does not clip", ge=0)

    def check(self) -> Iterator[Problem]:
        """min_lr below lr."""
        if self.min_lr > self.lr:
            yield Problem("min_lr", f"{self.min_lr} is above optimizer.lr = {self.lr}")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """Learning-rate schedule: warm-up, then WSD (Hu et al. 2024), cosine, linear or constant."""

    lr_decay_style: Literal["WSD", "cosine", "linear", "constant"] = setting("WSD", "shape after warm-up")
    lr_warmup_iters: int = setting(0, "steps of linear warm-up", ge=0)
    lr_decay_iters: int = setting(0, "step at which the decay ends; 0 is train.train_iters", ge=0)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = setting(
        "minus_sqrt", "shape of the WSD decay"
    )
    lr_wsd_decay_iters: int = setting(0, "steps of the WSD decay; 0 is a fifth of the run", ge=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """Saving and resuming."""

    save: bool = setting(True, "write checkpoints into the run directory")
    load: str = setting(
        "", "run or step directory to resume from; 'auto' resumes this run directory if it has a checkpoint"
    )
    save_interval: int = setting(0, "steps between checkpoints; 0 saves only at the end", ge=0)
    async_save: bool = setting(False, "write in the background")
    most_recent_k: int = setting(2, "checkpoints kept; 0 keeps all", ge=0)


@dataclass(frozen=True, kw_only=True)
class LoggerConfig(Config):
    """Metrics always go to metrics.jsonl and report.html."""

    log_interval: int = setting(10, "steps between lines on the terminal", ge=1)
    tensorboard: bool = setting(False, "also log to TensorBoard (extra: tensorboard)")
    wandb: str = setting("", "also log to this W&B project (extra: wandb)")
    mlflow: str = setting("", "also log to this MLflow experiment (extra: mlflow)")
    trackio: str = setting("", "also log to this Trackio project (extra: trackio)")
    peak_flops: float = setting(
        0.0,
        "peak FLOP/s of the device for the utilization figure; 0 measures a matrix product at start",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Everything about a run; recipes are functions that return one."""

    run: RunSettings = setting(RunSettings, "where and how")
    model: HybridConfig = setting(doc="the model")
    encoders: dict[str, VisionConfig | AudioConfig] = setting(
        dict, "what turns images, video and sound into rows of the decoder, by name"
    )
    data: DataConfig = setting(DataConfig, "the data")
    train: TrainConfig = setting(TrainConfig, "the loop")
    validation: ValidationConfig = setting(ValidationConfig, "evaluation")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "AdamW")
    scheduler: SchedulerConfig = setting(SchedulerConfig, "learning rate")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "checkpoints")
    plan: PlanConfig = setting(PlanConfig, "where each part of the model runs")
    logger: LoggerConfig = setting(LoggerConfig, "metrics")

    @property
    def directory(self) -> Path:
        """Where the run's files lie."""
        return Path(self.run.dir or f"runs/{self.run.name}")

    @property
    def cache(self) -> Path:
        """Where tokenized corpora lie, shared by the runs of one parent directory."""
        return Path(self.data.cache or self.directory.parent / ".cache")

    @property
    def modules(self) -> Modules:
        """Decoder and encoders, and what of them is trained."""
        return Modules(self.model, self.encoders, self.train.freeze, self.plan.decoder.tp_embed > 1)

    def check(self) -> Iterator[Problem]:
        """What two sections must agree on."""
        yield from self._check_encoders()
        scheduler, warm = self.scheduler, self.scheduler.lr_warmup_iters
        last = scheduler.lr_decay_iters or self.train.train_iters
        if scheduler.lr_decay_style == "WSD" and warm + scheduler.lr_wsd_decay_iters > last:
            decay = scheduler.lr_wsd_decay_iters
            message = (
                f"warm-up ({warm}) and WSD decay ({decay}) exceed the schedule's {last} steps; shorten one"
            )
            yield Problem("scheduler.lr_warmup_iters", message)
        elif warm > last:
            message = f"warm-up ({warm}) exceeds the schedule's {last} steps; shorten it"
            yield Problem("scheduler.lr_warmup_iters", message)
        if not self.data.tokenizer.path and self.data.source != "mock":
            trained, vocab = self.data.tokenizer.vocab_size, self.model.vocab_size
            if trained > vocab:
                message = f"{trained} tokens do not fit model.vocab_size = {vocab}; lower it or raise that"
                yield Problem("data.tokenizer.vocab_size", message)

    def _check_encoders(self) -> Iterator[Problem]:
        """Names, widths and tokens of encoders; what is frozen."""
        names = [DECODER, *self.encoders]
        for name in self.plan.encoders:
            if name not in self.encoders:
                known = ", ".join((*names, "experts", "schedule"))
                hint = did_you_mean(name, (*names, "experts", "schedule"))
                yield Problem(
                    f"plan.{name}", f"the run has no encoder of this name{hint} (the plan has {known})"
                )
        for name, encoder in self.encoders.items():
            path = f"encoders.{name}"
            if name in RESERVED or not FORM.fullmatch(name):
                yield Problem(
                    path, f"an encoder's name is a word, and none of {', '.join(RESERVED)}; rename it"
                )
            if encoder.output_size != self.model.hidden_size:
                fix = f"but model.hidden_size is {self.model.hidden_size}; set both alike"
                yield Problem(f"{path}.output_size", f"{encoder.output_size}, {fix}")
            for token in ("token", "start_token", "end_token"):
                if (value := int(getattr(encoder, token))) >= self.model.vocab_size:
                    yield Problem(
                        f"{path}.{token}", f"{value} is not below model.vocab_size = {self.model.vocab_size}"
                    )
        words = [
            DECODER,
            *(word for name in self.encoders for word in (name, f"{name}.body", f"{name}.projector")),
        ]
        for word in self.train.freeze:
            if word not in words:
                message = f"nothing is called {word!r}{did_you_mean(word, words)}; use {', '.join(words)}"
                yield Problem("train.freeze", message)
