"""The Python API: a recipe, a run, a model. The rest of Weft is reached from what these return."""

from pathlib import Path

from weft.checkpoint.model import load_model
from weft.config.resolve import override_layer, resolve
from weft.models.hybrid import HybridLM
from weft.parallel.comm import Comm, SingleComm
from weft.recipes.registry import build
from weft.spec.run import RunConfig
from weft.train.run import Run, pick_device


def recipe(name: str, *settings: str) -> RunConfig:
    """The run of a recipe, with settings written as on the command line (``train.precision=fp64``).

    Raises:
        ConfigError: no such recipe, or settings that are wrong, all at once.
    """
    return resolve(build(name), [override_layer(RunConfig, settings)], f"recipe {name}").config


def start(config: RunConfig, comm: Comm | None = None) -> Run:
    """This rank's part of a run, ready for its first step: plan checked, data open, model built or resumed.

    ``comm`` joins the ranks (``weft.parallel.threads.run_threads``, ``weft.parallel.launch.connected``);
    without one this process is the only rank. Every rank calls this. The result has a ``trainer`` and its
    ``saving``; ``execute()`` does the whole run. Settings of the process (``run.threads``,
    ``run.deterministic``, ``run.watchdog``) are left to the caller.

    Raises:
        WeftError: a plan that does not fit, data or a checkpoint that cannot be read.
    """
    return Run(config, {}, comm or SingleComm(), pick_device(config), lambda step, activity: None)


def load(path: str | Path, precision: str = "fp32") -> HybridLM:
    """The model of a run, checkpoints or step directory, whole and on the CPU, whatever plan wrote it.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    return load_model(Path(path), precision)[0]
