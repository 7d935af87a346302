"""Trackers: found missing before training, told every finite number, resumed under their own ids."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from weft.config.errors import ConfigError
from weft.spec.run import LoggerConfig
from weft.train.metrics import FILE, Metrics

ALL = {"tensorboard": True, "wandb": "project", "mlflow": "experiment", "trackio": "project"}
MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


class Fake(ModuleType):
    """A module whose every function writes down how it was called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []

    def __getattr__(self, function: str):
        if function.startswith("__"):
            raise AttributeError(function)

        def call(*args, **kwargs):
            self.calls.append((function, args, kwargs))
            inner = SimpleNamespace(run_id="run-7")
            members = {name: getattr(self, name) for name in ("log", "finish", "add_scalar", "close")}
            return SimpleNamespace(id="id-7", info=inner, **members)

        return call

    def named(self, function: str) -> list[tuple]:
        return [(args, kwargs) for name, args, kwargs in self.calls if name == function]


@pytest.fixture
def fakes(monkeypatch):
    made = {name: Fake(module) for name, module in MODULES.items()}
    for fake in made.values():
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return made


def run(run_dir, steps, resume_step=0, **wanted):
    settings = {"model": {"hidden_size": 8, "limit": float("inf")}}
    with Metrics(run_dir, LoggerConfig(**(wanted or ALL)), resume_step, settings) as metrics:
        for step in steps:
            row = {"step": step, "loss": 2.0, "bad": float("nan"), "entropy": {"layers.1": 1.5}, "x": [1.0]}
            metrics.log(row)


def test_all_missing_packages_are_named_at_once_and_nothing_is_touched(tmp_path, monkeypatch):
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        Metrics(tmp_path / "run", LoggerConfig(**ALL))
    for name in ALL:
        assert f"logger.{name}: needs the package {name}" in str(error.value)
        assert f"`pip install {name}`" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_unless_asked_for(tmp_path, monkeypatch):
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    run(tmp_path, [1], tensorboard=False)
    assert (tmp_path / FILE).is_file()


def test_every_tracker_gets_the_finite_numbers(tmp_path, fakes):
    run(tmp_path / "demo", [1, 2])
    values = {"loss": 2.0, "entropy/layers.1": 1.5}
    assert fakes["tensorboard"].named("add_scalar") == [
        ((n, v, s), {}) for s in (1, 2) for n, v in values.items()
    ]
    for name, function in (("wandb", "log"), ("mlflow", "log_metrics"), ("trackio", "log")):
        assert fakes[name].named(function) == [((values,), {"step": step}) for step in (1, 2)]
    for name, function in (
        ("tensorboard", "close"),
        ("wandb", "finish"),
        ("mlflow", "end_run"),
        ("trackio", "finish"),
    ):
        assert fakes[name].named(function) == [((), {})]


def test_a_new_run_is_named_and_shows_its_settings(tmp_path, fakes):
    run(tmp_path / "demo", [1])
    settings = {"model": {"hidden_size": 8, "limit": None}}
    wandb = {"project": "project", "name": "demo", "dir": str(tmp_path / "demo"), "config": settings}
    assert fakes["wandb"].named("init") == [((), {**wandb, "id": None, "resume": "allow"})]
    assert fakes["mlflow"].named("set_experiment") == [(("experiment",), {})]
    assert fakes["mlflow"].named("start_run") == [((), {"run_name": "demo"})]
    assert fakes["mlflow"].named("log_dict") == [((settings, "config.json"), {})]
    trackio = {"project": "project", "name": "demo", "config": settings, "resume": "never"}
    assert fakes["trackio"].named("init") == [((), trackio)]
    ids = json.loads((tmp_path / "demo" / "trackers.json").read_text())
    assert ids == {"wandb": "id-7", "mlflow": "run-7"}


def test_a_resumed_run_goes_on_under_its_ids(tmp_path, fakes):
    run(tmp_path, [1, 2])
    run(tmp_path, [2], resume_step=1)
    assert fakes["wandb"].named("init")[1][1]["id"] == "id-7"
    assert fakes["mlflow"].named("start_run")[1] == ((), {"run_id": "run-7"})
    assert fakes["trackio"].named("init")[1][1]["resume"] == "allow"
    assert fakes["tensorboard"].named("SummaryWriter")[1][1] == {"purge_step": 2}
    run(tmp_path, [1])
    assert fakes["wandb"].named("init")[2][1]["id"] is None


def test_real_tensorboard_shows_one_value_per_step_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, [1, 2, 3], tensorboard=True)
    run(tmp_path, [3, 4], resume_step=2, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert set(events.Tags()["scalars"]) == {"loss", "entropy/layers.1"}
