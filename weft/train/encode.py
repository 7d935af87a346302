"""Forward passes of encoders: what a rank computes of the items of a group of microbatches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from weft.models.encoder import Encoder
from weft.models.vision import choose
from weft.nn.context import Context
from weft.plan.boundary import Group, Table
from weft.plan.items import Item
from weft.plan.stages import Piece as Stage
from weft.spec.vision import VisionConfig
from weft.train.team import Member, Team

Fetch = Callable[[Item, int, int, int], Shaped[np.ndarray, "..."]]
"""Of an item: of one of its sequences, by number: from which patch or frame on, and up to which."""


@dataclass(frozen=True)
class Encoding:
    """One group of microbatches, as a rank of an encoder computes it.

    Attributes:
        member: the encoder.
        number: of the group.
        group: who encodes what, and where it goes.
    """

    member: Member
    number: int
    group: Group

    @property
    def key(self) -> tuple[str, int]:
        """Names the pass."""
        return self.member.name, self.number

    @property
    def model(self) -> Encoder:
        """The units that are here."""
        model = self.member.model
        assert isinstance(model, Encoder)  # noqa: S101 - only encoders are asked
        return model

    def context(self) -> Context:
        """The pass of this rank's bin."""
        return self.model.context(self.group.pieces(self.member.mesh.rank))

    @property
    def idle(self) -> bool:
        """Whether this rank has nothing to compute, and no peer waits for it.

        Ranks that share parameters of units (store levels 2 and 3) use them together, so there a rank without
        rows goes along with none of them; and so do ranks that share sequences.
        """
        mesh, rank = self.member.mesh, self.member.mesh.rank
        together = mesh.layout.store.level >= 2 and mesh.store(mesh.layout).size > 1
        return self.group.empty or not (together or any(map(len, self.group.pieces(rank).ranks)))

    def fetch(self, read: Fetch) -> list[Shaped[np.ndarray, "..."]]:
        """What the pieces of this rank's rows are made of; only a rank of the first stage reads anything."""
        ctx, found = self.context(), self.group.sequences
        if self.member.mesh.position != 0 or ctx.pieces is None:
            return []
        data: list[Shaped[np.ndarray, "..."]] = []
        for number, start, stop, _ in ctx.pieces.part(range(ctx.pieces.rows)[ctx.rows]):
            inside, item = found.inside[number], found.items[found.item[number]]
            data.append(read(item, inside, *self.group.config.reads(start, stop, item.sizes[inside])))
        return data

    def first(self, data: Sequence[Shaped[np.ndarray, "..."]]) -> Float[Tensor, "rows embed"]:
        """Rows before the first layer."""
        model = self.model
        dtype = next(model.parameters()).dtype
        tensors = [torch.from_numpy(array).to(model.device, dtype, non_blocking=True) for array in data]
        return model.first(tensors, self.context())

    def last(self, x: Float[Tensor, "rows embed"]) -> tuple[Float[Tensor, "outputs width"], ...]:
        """What goes to the decoder of each microbatch, from the rows after the last layer."""
        made = self.model.last(x, self.context())
        if not self.member.module.moved:
            made = self.pruned(self.model.projector(made))
        return made.split(self.group.outputs(self.member.mesh.rank))

    def pruned(self, rows: Float[Tensor, "all width"]) -> Float[Tensor, "kept width"]:
        """Without the rows of videos that are dropped (the whole of each video is here then)."""
        config, found = self.member.module.config, self.group.sequences
        if not isinstance(config, VisionConfig) or not config.pruning:
            return rows
        numbers = dict.fromkeys(found.item[p.sequence] for p in self.group.pieces(self.member.mesh.rank).here)
        kept: list[Tensor] = []
        for item in (found.items[number] for number in numbers):
            cells, groups = config.outputs(item.sizes[0]), len(item.sizes)
            own, rows = rows[: cells * groups], rows[cells * groups :]
            video = item.sizes[0][0] > 1
            kept.append(own[choose(own, groups, cells, config.pruning)] if video else own)
        return torch.cat([rows[:0], *kept])

    def nothing(self, piece: Stage) -> tuple[Float[Tensor, "outputs width"], ...]:
        """What a stage of an idle rank hands on."""
        config = self.group.config
        width, count = config.hidden_size, 1
        if piece.last:
            width = config.feature_width if self.member.module.moved else config.output_size
            count = len(self.group.tables)
        dtype = next(self.model.parameters()).dtype
        return (torch.zeros(0, width, dtype=dtype, device=self.model.device),) * count


@dataclass(frozen=True)
class Inputs:
    """What the encoders here read in a step, and what all ranks know of all encoders.

    Attributes:
        every: microbatches of a group, by encoder.
        groups: by encoder and number.
        data: of the first stages here, likewise.
    """

    every: Mapping[str, int]
    groups: Mapping[tuple[str, int], Group]
    data: Mapping[tuple[str, int], list[Shaped[np.ndarray, "..."]]] = field(default_factory=dict[Any, Any])


def groups_of(team: Team, every: Mapping[str, int], tables: Sequence[Table]) -> Inputs:
    """Who encodes what of these microbatches; the last group may be smaller."""
    found: dict[tuple[str, int], Group] = {}
    for name, config in team.modules.encoders.items():
        for number, start in enumerate(range(0, len(tables), every[name])):
            part = tables[start : start + every[name]]
            found[name, number] = Group(team.plans, name, config, part)
    return Inputs(every, found)


def fetched(team: Team, inputs: Inputs, read: Fetch) -> Inputs:
    """With routes compiled, and what the ranks of first stages read."""
    for (name, _), group in inputs.groups.items():
        if team.borders[name].sends or team.borders[name].receives:
            group.prepare()
    here = (
        (key, team.members[key[0]], group) for key, group in inputs.groups.items() if key[0] in team.members
    )
    encodings = {key: Encoding(member, key[1], group) for key, member, group in here}
    return replace(inputs, data={key: one.fetch(read) for key, one in encodings.items() if not one.idle})
