"""AdamW on the store's shards, and the router's correction bias."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weft.models.hybrid import HybridLM
from weft.nn.moe import MoE
from weft.parallel.comm import Comm
from weft.parallel.flat import Stored
from weft.parallel.store import Store
from weft.parallel.together import Union
from weft.spec.run import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Decoupled weight decay Adam (Loshchilov and Hutter 2019), one fused call per flat."""

    def __init__(self, store: Store, config: OptimizerConfig) -> None:
        self.store, self.config = store, config
        for flat in store.flats:
            flat.master.grad = flat.grad
        groups = [
            {"params": [flat.master], "weight_decay": config.weight_decay if flat.decay else 0.0}
            for flat in store.flats
        ]
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        for flat in store.flats:  # made now, so that a resumed run fills the same tensors
            zero = {name: torch.zeros_like(flat.master) for name in MOMENTS}
            self.adamw.state[flat.master] = {"step": torch.zeros((), device=flat.master.device), **zero}

    def clip(self, norm: Tensor) -> None:
        """Scale gradients so that their global norm is at most ``clip_grad``."""
        if self.config.clip_grad:
            self.store.scale((self.config.clip_grad / (norm + 1e-6)).clamp_max(1.0))

    def step(self, lr: float) -> None:
        """Update master values and publish them."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.store.publish()

    def pieces(self, full: Callable[[str], str]) -> Iterator[Stored]:
        """What this rank has of moments, and of master values where they differ, by checkpoint name."""
        for flat in self.store.flats:
            state = self.adamw.state[flat.master]
            values = {moment: state[moment] for moment in MOMENTS}
            if flat.master is not flat.shard:
                values["master"] = flat.master
            for kind, tensor in values.items():
                for piece in flat.pieces(tensor):
                    yield replace(piece, name=f"optimizer/{kind}/{full(piece.name)}")

    @property
    def steps(self) -> int:
        """Updates so far (the bias correction's exponent)."""
        return int(self.adamw.state[self.store.flats[0].master]["step"].item())

    @steps.setter
    def steps(self, value: int) -> None:
        for flat in self.store.flats:
            self.adamw.state[flat.master]["step"].fill_(value)


class RouterLoad:
    """Choices of each expert over one global batch, and the correction bias they move.

    Attributes:
        counts: choices of each expert so far, by layer, those without room included.
        dropped: of the step that ``finish`` ended, the choices of each layer that had no room.
    """

    def __init__(self, model: HybridLM | None, device: torch.device) -> None:
        self.device = device
        self._units = model.units() if model else {}
        self._physical_depths = len(model.config.mtp) if model else 0
        self.counts: dict[str, Tensor] = {}
        self.dropped: dict[str, Tensor] = {}
        self._drops: dict[str, Tensor] = {}
        self._union: Union | None = None

    def add(self, key: str, counts: Tensor, drop: Tensor | int = 0) -> None:
        """Add one microbatch; repetitions of an MTP depth count for the one physical layer."""
        name = self._physical(key)
        self.counts[name] = self.counts.get(name, 0) + counts
        self._drops[name] = self._drops.get(name, counts.new_zeros(())) + drop

    def _physical(self, key: str) -> str:
        part, depth, *rest = key.split(".")
        return ".".join(["mtp", str(int(depth) % self._physical_depths), *rest]) if part == "mtp" else key

    def finish(self, comm: Comm, rate: float) -> dict[str, Tensor]:
        """Sum over ranks, move every bias by ``rate * sign(mean - count)``, return the counts."""
        if comm.size > 1:
            self._sum(comm)
        for name, counts in self.counts.items() if rate else ():
            moe = getattr(self._units.get(name), "mixer", None)
            if isinstance(moe, MoE):
                above = len(counts) * counts - counts.sum()  # whole numbers: an even load moves nothing
                moe.router.bias -= rate * above.sign().to(moe.router.bias.dtype)
        counts, self.counts = self.counts, {}
        self.dropped, self._drops = self._drops, {}
        return counts

    def _sum(self, comm: Comm) -> None:
        """Over ranks, of the layers of all pipeline ranks."""
        if self._union is None:
            self._union = Union(comm)
        sizes = self._union.of({name: len(counts) for name, counts in self.counts.items()})
        names = sorted(sizes, key=in_order)
        if not names:
            return
        device = self.device
        none = {name: torch.zeros(sizes[name] + 1, dtype=torch.int64, device=device) for name in names}
        own = {
            n: torch.cat([self.counts[n], self._drops[n].view(1)]) if n in self.counts else none[n]
            for n in names
        }
        rows = comm.all_reduce(torch.cat(list(own.values()))).split([sizes[name] + 1 for name in names])
        self.counts = {name: row[:-1] for name, row in zip(names, rows, strict=True)}
        self._drops = {name: row[-1] for name, row in zip(names, rows, strict=True)}


def in_order(unit: str) -> tuple[bool, list[int]]:
    """Sorts names of layers as the model uses them: ``layers.10`` after ``layers.9``, MTP depths last."""
    return unit.startswith("mtp."), [int(word) for word in unit.split(".") if word.isdecimal()]


def load_row(counts: dict[str, Tensor], dropped: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """What ``metrics.jsonl`` says of the load of a step; ``dropped`` where capacity is limited."""
    if not counts:
        return {}
    shares = {name: (c / c.sum().clamp_min(1)).tolist() for name, c in counts.items()}
    row: dict[str, Any] = {
        "expert_load_max": max(max(share) * len(share) for share in shares.values()),
        "expert_load": {name: [round(s, 6) for s in share] for name, share in shares.items()},
    }
    if dropped:
        pairs = {name: max(1, int(counts[name].sum())) for name in dropped}
        lost = {name: int(drop) for name, drop in dropped.items()}
        row["drop_rate"] = {name: lost[name] / pairs[name] for name in dropped}
        row["drop_rate_total"] = sum(lost.values()) / sum(pairs.values())
    return row
