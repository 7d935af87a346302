"""Trackers beside metrics.jsonl: TensorBoard, W&B, MLflow, Trackio. None is imported unless asked for.

One more tracker is one function that starts it and one line of ``_PLUGINS``.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.config.errors import ConfigError, Problem
from weft.spec.run import LoggerConfig


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        dir: run directory; its name is the name of the run.
        resume_step: last step done before this process; 0 for a new run.
        settings: the configuration as plain values.
    """

    dir: Path
    resume_step: int
    settings: Mapping[str, Any]

    def remembered(self, tracker: str) -> str | None:
        """The id that ``tracker`` gave this run before it was interrupted; None for a new run."""
        return self._ids().get(tracker) if self.resume_step else None

    def remember(self, tracker: str, run_id: object) -> None:
        """Keep the id that ``tracker`` gives this run."""
        self.dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self._ids(), tracker: str(run_id)}, indent=2)
        (self.dir / "trackers.json").write_text(text + "\n", encoding="utf-8")

    def _ids(self) -> dict[str, str]:
        path = self.dir / "trackers.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class Tracker:
    """What follows the metrics of a run: two functions, ``write(values, step)`` and ``finish()``."""

    write: Callable[[dict[str, float], int], object]
    finish: Callable[[], object]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the finite numbers of one step."""
        self.write(dict(values), step)

    def close(self) -> None:
        """Send what is left and end."""
        self.finish()


def _tensorboard(module: Any, target: object, run: TrackedRun) -> Tracker:
    """Event files in ``tensorboard/`` of the run directory; events after the resumed step are purged."""
    writer = module.SummaryWriter(str(run.dir / "tensorboard"), purge_step=run.resume_step + 1)

    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, writer.close)


def _wandb(module: Any, target: object, run: TrackedRun) -> Tracker:
    """A W&B run, resumed under its id; W&B keeps the first value of a step that is repeated."""
    known, settings = run.remembered("wandb"), dict(run.settings)
    active = module.init(
        project=target, name=run.dir.name, dir=str(run.dir), config=settings, id=known, resume="allow"
    )
    run.remember("wandb", active.id)
    return Tracker(lambda values, step: active.log(values, step=step), active.finish)


def _mlflow(module: Any, target: object, run: TrackedRun) -> Tracker:
    """An MLflow run in the experiment ``target``, resumed under its id; its settings are ``config.json``."""
    module.set_experiment(target)
    known = run.remembered("mlflow")
    active = module.start_run(run_id=known) if known else module.start_run(run_name=run.dir.name)
    run.remember("mlflow", active.info.run_id)
    module.log_dict(dict(run.settings), "config.json")
    return Tracker(lambda values, step: module.log_metrics(values, step=step), module.end_run)


def _trackio(module: Any, target: object, run: TrackedRun) -> Tracker:
    """A Trackio run, resumed by its name."""
    resume = "allow" if run.resume_step else "never"
    module.init(project=target, name=run.dir.name, config=dict(run.settings), resume=resume)
    return Tracker(lambda values, step: module.log(values, step=step), module.finish)


# setting of LoggerConfig -> (module to import, package that brings it, how to start it)
_PLUGINS: dict[str, tuple[str, str, Callable[[Any, object, TrackedRun], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", _tensorboard),
    "wandb": ("wandb", "wandb", _wandb),
    "mlflow": ("mlflow", "mlflow", _mlflow),
    "trackio": ("trackio", "trackio", _trackio),
}


def open_trackers(logger: LoggerConfig, run: TrackedRun) -> list[Tracker]:
    """Start every tracker that the settings name; call it before training.

    Raises:
        ConfigError: packages that are not installed, all at once, each with the line that installs it.
    """
    wanted = {name: plugin for name, plugin in _PLUGINS.items() if getattr(logger, name)}
    modules: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, (module, package, _) in wanted.items():
        try:
            modules[name] = importlib.import_module(module)
        except ImportError as error:
            message = (
                f"needs the package {package} ({error}); `pip install {package}` or leave the setting out"
            )
            problems.append(Problem(f"logger.{name}", message))
    if problems:
        raise ConfigError(problems)
    return [start(modules[name], getattr(logger, name), run) for name, (_, _, start) in wanted.items()]
