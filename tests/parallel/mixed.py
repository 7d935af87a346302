"""Multimodal runs of a tiny decoder and tiny encoders under any plans, compared with one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.once import once
from tests.tiny import CONFIG
from weft.build.model import Values
from weft.data.batch import Batch, empty, join
from weft.parallel.comm import Comm, SingleComm
from weft.plan.box import Box
from weft.plan.items import Item, Placed
from weft.plan.plans import plans_of_run
from weft.plan.runs import Run
from weft.spec.audio import AudioConfig
from weft.spec.data import DataConfig
from weft.spec.encoder import EncoderConfig
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import PlanConfig
from weft.spec.param import ParamSpec
from weft.spec.run import OptimizerConfig, RunConfig, TrainConfig
from weft.spec.vision import VisionConfig, kept
from weft.train.loop import Trainer
from weft.train.team import assembled

CPU = torch.device("cpu")
TOLERANCE = 1e-10
LONGEST = 48  # tokens of a sample
DENSE = replace(CONFIG, pattern="M*-", mtp_num_depths=0)
SPARSE = replace(CONFIG, pattern="ME*-/*E")
VISION = VisionConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    initializer_range=0.3,
    output_size=16,
    projector_size=20,
    token=60,
    patch=2,
    prefix=3,
    max_grid=8,
    min_patches=4,
    max_patches=64,
    video_grid=4,
)
AUDIO = AudioConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    initializer_range=0.3,
    output_size=16,
    projector_size=20,
    token=59,
    mels=8,
    subsampling_channels=4,
    conv_kernel=5,
)
ENCODERS: dict[str, EncoderConfig] = {"vision": VISION, "audio": AUDIO}


def config_of(
    model: HybridConfig,
    plan: PlanConfig,
    encoders: dict[str, Any],
    *,
    samples: int = 6,
    micro: int = 2,
    **train: Any,
) -> RunConfig:
    """A run of two steps."""
    settings = TrainConfig(
        train_iters=2, global_batch_size=samples, micro_batch_size=micro, loss_chunk=16, **train
    )
    data = DataConfig(source="digits", seq_length=LONGEST)
    return RunConfig(
        model=model,
        encoders=encoders,
        train=settings,
        data=data,
        plan=plan,
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-3),
    )


class Mixed:
    """Samples of random texts, pictures, videos and clips; every third one is text alone."""

    def __init__(self, encoders: dict[str, EncoderConfig], depths: int, vocab: int = 58) -> None:
        self.encoders, self.depths, self.vocab = encoders, depths, vocab

    def state(self, samples: int) -> dict[str, Any]:
        return {"samples": samples}

    def microbatch(self, start: int, count: int) -> Batch:
        made = [self._sample(g) for g in range(start, start + count)]
        return join(made) if made else empty(self.depths + 1)

    def _sample(self, g: int) -> Batch:
        rng = np.random.default_rng(g)
        tokens, items, lengths = list[int](), list[Placed](), list[int]()
        names = [] if g % 3 == 2 else [n for n in self.encoders for _ in range(int(rng.integers(0, 3)))]
        for number, name in enumerate(names):
            item = self._item(name, (g, number), rng)
            room = LONGEST - len(tokens) - item.rows - 4
            if room < 0:
                continue
            before = int(rng.integers(1, 4))
            tokens += rng.integers(0, self.vocab, before).tolist()
            items.append(Placed(item, (Run(len(tokens), item.rows),)))
            tokens += [self.encoders[name].token] * item.rows
            lengths.append(before + item.rows)
        rest = int(rng.integers(1, min(9, LONGEST - len(tokens)) + 1))
        tokens += rng.integers(0, self.vocab, rest).tolist()
        lengths.append(rest)
        cut = [sum(lengths[:1]), sum(lengths[1:])] if len(lengths) > 1 and g % 2 else [sum(lengths)]
        return _batch(tokens, cut, self.depths, g, tuple(items), {e.token for e in self.encoders.values()})

    def _item(self, name: str, ref: tuple[int, int], rng: np.random.Generator) -> Item:
        config = self.encoders[name]
        if isinstance(config, VisionConfig):
            grid = tuple(int(n) for n in rng.integers(1, 4, 2) * config.merge)
            frames, groups = (config.frames, int(rng.integers(1, 3))) if ref[0] % 4 == 1 else (1, 1)
            sizes = ((frames, *grid),) * groups
        else:
            frames, sizes = 1, ((int(rng.integers(3, 60)),),)
        rows = sum(config.outputs(size) for size in sizes)
        if isinstance(config, VisionConfig) and config.pruning and frames > 1:
            rows = kept(len(sizes), config.outputs(sizes[0]), config.pruning)
        return Item(name, sizes, rows, ref)


def _batch(
    tokens: list[int],
    lengths: list[int],
    depths: int,
    sample: int,
    items: tuple[Placed, ...],
    marks: set[int],
) -> Batch:
    ids = np.array(tokens, np.int64)
    future = np.full((depths + 1, len(ids)), -1, np.int64)
    start = 0
    for n in lengths:
        for k in range(1, depths + 2):
            left = max(0, n - k)
            future[k - 1, start : start + left] = ids[start + n - left : start + n]
        start += n
    mask = (future >= 0) & ~np.isin(future, list(marks))
    return Batch(ids, future, mask, tuple(lengths), (sample,), (len(ids),), items)


def reader(encoders: dict[str, EncoderConfig]) -> Callable[[Item, int, int, int], np.ndarray]:
    """Random patches and frames, the same whoever asks."""

    def read(item: Item, sequence: int, first: int, last: int) -> np.ndarray:
        config, size = encoders[item.encoder], item.sizes[sequence]
        if isinstance(config, VisionConfig):
            shape = size[1] * size[2], size[0] * config.channels * config.patch**2
        else:
            shape = size[0], config.mels
        rng = np.random.default_rng([*map(int, item.ref), sequence, len(item.encoder)])
        return rng.standard_normal(shape).astype(np.float32)[first:last]

    return read


def values() -> Values:
    """Random values of everything, by full name; statistics and scales are positive."""

    @cache
    def whole(spec: ParamSpec) -> Tensor:
        seed = int.from_bytes(spec.name.encode()[-6:], "little") ^ sum(spec.name.encode())
        drawn = 0.2 * torch.randn(
            spec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        positive = spec.init.kind == "ones" or spec.name.endswith(("var", "A_log"))
        return drawn.abs() + 0.6 if positive else drawn

    return lambda spec, box, dtype: whole(spec)[box.within(Box.whole(spec.shape))].to(dtype).clone()


def trainer_of(config: RunConfig, comm: Comm) -> Trainer:
    """A trainer on this rank."""
    plans = plans_of_run(config, comm.size)
    team = assembled(plans, config.modules, comm, config.train.precision, CPU, values())
    return Trainer(config, team, Mixed(config.encoders, config.model.depths), reader(config.encoders))


def boxes(trainer: Trainer) -> list[tuple[str, Box, Tensor]]:
    """Parameters and gradients in global coordinates, what this rank owns of them."""
    kinds: dict[str, Callable[[Any], Tensor]] = {"param": lambda f: f.master, "grad": lambda f: f.grad}
    return [
        (f"{kind} {trainer.team.members[name].module.full(stored.name)}", stored.box, stored.tensor.clone())
        for name, store in trainer.stores.items()
        for kind, choose in kinds.items()
        for stored in store.pieces(choose)
        if stored.owned
    ]


def run(trainer: Trainer) -> list[dict[str, Any]]:
    """The rows of two steps, as the loop makes them."""
    steps = (trainer.batches(trainer.config.train.global_batch_size * i) for i in range(2))
    return [trainer.next_step(i, steps) for i in (1, 2)]


@once(32)
def _reference(key: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    config = _KEYS[key]
    trainer = trainer_of(config, SingleComm())
    rows = run(trainer)
    return rows, {name: tensor for name, _, tensor in boxes(trainer)}


_KEYS: dict[str, RunConfig] = {}


def reference(config: RunConfig) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Two steps of one process: rows, every parameter and gradient."""
    batch = config.train.global_batch_size
    alone = replace(config, plan=PlanConfig(), train=replace(config.train, micro_batch_size=batch))
    _KEYS[repr(alone)] = alone
    return _reference(repr(alone))


def differences(config: RunConfig, comm: Comm) -> list[str]:
    """What differs on this rank from one process."""
    want_rows, want = reference(config)
    trainer = trainer_of(config, comm)
    found: list[str] = []
    for row, one in zip(run(trainer), want_rows, strict=True):
        for name in ("loss", "lm_loss", "mtp_loss", "aux_loss", "grad_norm"):
            if not abs(row[name] - one[name]) <= TOLERANCE * max(1.0, abs(one[name])):
                found.append(f"step {row['step']}: {name} {row[name]} != {one[name]}")
        if row.get("routing_hash") != one.get("routing_hash"):
            found.append(f"step {row['step']}: routing")
    owned: dict[str, int] = {}
    for name, box, tensor in boxes(trainer):
        expected = want[name][box.within(Box.whole(want[name].shape))]
        owned[name] = owned.get(name, 0) + tensor.numel()
        error = (tensor - expected).abs().max().item() if tensor.numel() else 0.0
        if not error <= TOLERANCE:
            found.append(f"{name} {box}: {error:.3g}")
    everyone = comm.gather_objects(owned)
    totals = {name: sum(each.get(name, 0) for each in everyone) for name in want}
    return found + [f"{n}: {t} elements owned" for n, t in totals.items() if t != want[n].numel()]
