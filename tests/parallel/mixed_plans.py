"""Plans of multimodal runs: one or more for each class of configurations, and random ones."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

from tests.parallel.mixed import AUDIO, DENSE, ENCODERS, SPARSE, VISION, config_of
from weft.plan.check import check_run
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, ScheduleConfig, StoreConfig
from weft.spec.run import RunConfig


@dataclass(frozen=True)
class Mixed:
    """A plan, on how many ranks, and what else is special."""

    ranks: int
    decoder: dict[str, Any]
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    sparse: bool = False
    train: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        """The run."""
        plan = PlanConfig(
            decoder=LayoutConfig(**_stored(self.decoder)),
            experts=ExpertsConfig(**self.experts),
            schedule=ScheduleConfig(**self.schedule),
            encoders={name: LayoutConfig(**_stored(layout)) for name, layout in self.encoders.items()},
        )
        model: HybridConfig = SPARSE if self.sparse else DENSE
        encoders = self.models or ENCODERS
        return config_of(model, plan, dict(encoders), **{"precision": "fp64", **self.train})


def _stored(layout: dict[str, Any]) -> dict[str, Any]:
    layout = dict(layout)
    if level := layout.pop("level", 0):
        layout["store"] = StoreConfig(level=level)
    return layout


NARROW = {"vision": VISION, "audio": replace(AUDIO, hidden_size=8)}
PRUNED = {"vision": replace(VISION, pruning=0.6), "audio": AUDIO}
MANY = {"left": VISION, "right": VISION, "sound": AUDIO}
CLASSES: dict[str, Mixed] = {
    "homogeneous": Mixed(4, {"tp": 2, "dp": 2}, {"vision": {"tp": 2}, "audio": {"tp": 2}}),
    "colocated, encoders with more readers": Mixed(4, {"tp": 2, "dp": 2}, {"vision": {"dp": 4}}),
    "disjoint": Mixed(4, {"ranks": "2-3", "tp": 2}, {"vision": {"ranks": "0"}, "audio": {"ranks": "1"}}),
    "partly overlapping": Mixed(
        4, {"ranks": "1-3", "dp": 3}, {"vision": {"ranks": "0-1"}, "audio": {"ranks": "0-2"}}
    ),
    "readers 3 to 2": Mixed(3, {"ranks": "0-1", "dp": 2}, {"vision": {"dp": 3}, "audio": {"dp": 3}}),
    "readers 2 to 3, disjoint": Mixed(
        5, {"ranks": "2-4", "dp": 3}, {"vision": {"ranks": "0-1"}, "audio": {"ranks": "0-1"}}
    ),
    "context parallelism on both sides": Mixed(
        4, {"cp": 2, "dp": 2}, {"vision": {"cp": 2, "dp": 2}, "audio": {"cp": 4}}, sparse=True
    ),
    "context and tensor parallelism inside an encoder": Mixed(
        4, {"dp": 4}, {"vision": {"cp": 2, "tp": 2}, "audio": {"cp": 2, "tp": 2}}
    ),
    "pipelines on both sides, shared ranks": Mixed(
        4, {"pp": 2, "dp": 2}, {"vision": {"pp": 2, "dp": 2}, "audio": {"pp": 2, "tp": 2}}
    ),
    "pipelines on both sides, disjoint": Mixed(
        4,
        {"ranks": "2-3", "pp": 2},
        {"vision": {"ranks": "0-1", "pp": 2}, "audio": {"ranks": "0-1", "cp": 2}},
    ),
    "three encoders": Mixed(
        3,
        {"ranks": "0-1", "tp": 2},
        {"left": {"ranks": "2"}, "right": {"ranks": "0-2"}, "sound": {"ranks": "1-2"}},
        models=MANY,
    ),
    "interleaved": Mixed(2, {"pp": 2}, schedule={"kind": "interleaved", "layers": (1, 1, 1, 1)}, sparse=True),
    "zero bubble": Mixed(2, {"pp": 2}, schedule={"kind": "zero_bubble"}, train={"micro": 1}),
    "zbv, encoder in bubbles": Mixed(
        2, {"pp": 2}, schedule={"kind": "zbv", "encoder_order": "bubble"}, train={"micro": 1}, sparse=True
    ),
    "encoder first": Mixed(2, {"pp": 2}, schedule={"encoder_order": "first", "encoder_group": 3}),
    "groups of microbatches in bubbles": Mixed(
        2, {"pp": 2}, schedule={"encoder_order": "bubble", "encoder_group": 2}, train={"micro": 1}
    ),
    "stores of their own": Mixed(
        4,
        {"dp": 4, "level": 3},
        {"vision": {"dp": 4, "level": 3}, "audio": {"dp": 2, "tp": 2, "level": 1}},
        sparse=True,
    ),
    "store gathered by stage": Mixed(
        4,
        {"pp": 2, "dp": 2, "level": 3},
        {"vision": {"dp": 4, "level": 3}, "audio": {"dp": 4, "level": 2}},
        schedule={"gather": "stage"},
    ),
    "experts folded": Mixed(4, {"tp": 2, "dp": 2}, experts={"ep": 4}, sparse=True),
    "three-dimensional decoder": Mixed(4, {"tp": 2, "tp_embed": 2}, sparse=True),
    "another tp on each pipeline rank": Mixed(4, {"pp": 2, "tp_of_stages": (2, 1)}, {"vision": {"tp": 2}}),
    "frozen encoders": Mixed(3, {"ranks": "1-2", "dp": 2}, train={"freeze": ("vision", "audio")}),
    "frozen bodies, projectors trained": Mixed(
        4, {"tp": 2, "dp": 2}, train={"freeze": ("vision.body", "audio.body")}
    ),
    "narrower side of a frozen encoder crosses": Mixed(
        4, {"tp": 2, "dp": 2}, train={"freeze": ("audio.body",)}, models=NARROW
    ),
    "the same, disjoint and in stages": Mixed(
        4,
        {"ranks": "2-3", "pp": 2, "level": 1},
        {"vision": {"ranks": "0-1", "tp": 2}, "audio": {"ranks": "0-1", "pp": 2}},
        train={"freeze": ("audio.body", "decoder")},
        models=NARROW,
    ),
    "videos without their unchanging rows": Mixed(
        4, {"tp": 2, "dp": 2}, {"vision": {"dp": 4}, "audio": {"tp": 2}}, models=PRUNED
    ),
    "frozen decoder, in stages": Mixed(2, {"pp": 2}, train={"freeze": ("decoder",)}),
    "recomputed": Mixed(2, {"tp": 2}, {"vision": {"tp": 2}}, train={"recompute": True}, sparse=True),
    "activations on the host": Mixed(2, {"pp": 2}, schedule={"resident": 2}, train={"micro": 1}),
}
PROCESSES = ("partly overlapping", "pipelines on both sides, shared ranks", "stores of their own", "disjoint")
"""Those that run on processes too."""


def drawn(seed: int) -> Mixed:
    """A random plan that can be run, for up to six ranks."""
    rng = random.Random(seed)
    while True:
        made = _draw(rng)
        if not check_run(made.config(), made.ranks):
            return made


def _draw(rng: random.Random) -> Mixed:
    ranks = rng.randint(1, 6)
    encoders = {name: _layout(rng, ranks, False) for name in ENCODERS}
    order, kind = rng.choice(["lead", "first", "bubble"]), rng.choice(["gpipe", "1f1b", "zero_bubble"])
    schedule = {"kind": kind, "encoder_order": order, "encoder_group": rng.randint(1, 3)}
    sparse = rng.random() < 0.4
    names = ["vision", "audio", "vision.body", "audio.body", "decoder", "audio.projector"]
    freeze = tuple(rng.sample(names, rng.choice([0, 0, 1, 2])))
    train = {"micro": rng.randint(1, 2), "samples": rng.choice([5, 6, 7]), "freeze": freeze}
    return Mixed(ranks, _layout(rng, ranks, True), encoders, schedule, {}, sparse, train)


def _layout(rng: random.Random, world: int, decoder: bool) -> dict[str, Any]:
    first = rng.randint(0, world - 1)
    last = rng.randint(first, world - 1)
    axes = {axis: rng.choice([1, 1, 2]) for axis in ("pp", "cp", "tp")}
    if decoder and rng.random() < 0.15:
        axes["tp_embed"] = 2
    return {"ranks": f"{first}-{last}", "level": rng.choice([0, 0, 1, 2, 3]), **axes}
