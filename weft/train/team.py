"""What one rank has of a run: its modules, each with its layout, and the links between their stages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from weft.build.model import Model, Values, assemble_module
from weft.models.hybrid import HybridLM
from weft.parallel.border import Border
from weft.parallel.comm import Comm
from weft.parallel.links import Links
from weft.parallel.mesh import Mesh
from weft.plan.homes import uncut
from weft.plan.plans import Plans, stage_of
from weft.plan.schedule import Edge
from weft.plan.stages import Cut
from weft.spec.modules import DECODER, Module, Modules
from weft.spec.precision import PRECISIONS


@dataclass(frozen=True)
class Member:
    """A module, as this rank has it.

    Attributes:
        module: the whole.
        mesh: the rank's place.
        model: the units that are here.
        cut: the whole module in stages.
        links: to its stages on other pipeline ranks.
    """

    module: Module
    mesh: Mesh
    model: Model
    cut: Cut
    links: Links

    @classmethod
    def of(cls, module: Module, mesh: Mesh, model: Model) -> "Member":
        """As the plan cuts it; a collective call."""
        cut = mesh.plan.cut
        if cut is None:
            assert isinstance(model, HybridLM)  # noqa: S101 - encoders are always cut
            cut = uncut(model.config, mesh.plan.schedule)
        here = (s for s in module.params if mesh.has(s.name) and not s.buffer and not s.fp32)
        dtype = model.get_parameter(next(here).name).dtype
        stages = [(stage_of(module.name, i), home) for i, home in enumerate(cut.home)]
        edges = {Edge(a, b): (first, second) for (a, first), (b, second) in pairwise(stages)}
        links = Links(mesh, edges, module.config.hidden_size, dtype, model.device)
        return cls(module, mesh, model, cut, links)

    @property
    def name(self) -> str:
        """Of the module."""
        return self.module.name


@dataclass(frozen=True)
class Team:
    """All modules of a run, as one rank has them.

    Attributes:
        plans: of all modules.
        modules: all of them.
        comm: all ranks of the run.
        members: those of which there is something here.
        borders: between each encoder and the decoder.
    """

    plans: Plans
    modules: Modules
    comm: Comm
    members: Mapping[str, Member]
    borders: Mapping[str, Border] = field(default_factory=dict[str, Border])

    @property
    def rank(self) -> int:
        """Of the world."""
        return self.comm.ranks[self.comm.rank]

    @property
    def seat(self) -> int:
        """Which list of actions this rank follows."""
        return self.plans.seat(self.rank)

    @property
    def decoder(self) -> Member | None:
        """The decoder, if there is something of it here."""
        return self.members.get(DECODER)

    @property
    def lm(self) -> HybridLM | None:
        """The decoder's model."""
        model = self.decoder.model if self.decoder else None
        assert model is None or isinstance(model, HybridLM)  # noqa: S101 - what a decoder is
        return model

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        devices = (member.model.device for member in self.members.values())
        return next(devices, torch.device("cpu"))

    @property
    def cut(self) -> Cut:
        """Stages of the decoder."""
        plan = self.plans.decoder
        return plan.cut or uncut(self.modules.decoder, plan.schedule)


def assembled(
    plans: Plans, modules: Modules, comm: Comm, precision: str, device: torch.device, values: Values
) -> Team:
    """This rank's team, of models made from values by name; a collective call."""
    members: dict[str, Member] = {}
    for name, plan in plans.of_rank(comm.ranks[comm.rank]).items():
        module, mesh = modules.all[name], Mesh(plan, comm)
        members[name] = Member.of(module, mesh, assemble_module(module, precision, device, values, mesh))
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision].params)
    borders = {
        name: Border(plans, name, modules.width(name), comm, dtype, device) for name in modules.encoders
    }
    return Team(plans, modules, comm, members, borders)


def decoder_only(model: HybridLM, mesh: Mesh) -> Team:
    """A decoder without encoders; a collective call."""
    modules = Modules(model.config)
    plans = Plans(mesh.whole.world, {DECODER: mesh.whole})
    member = Member.of(modules.all[DECODER], mesh, model)
    return Team(plans, modules, mesh.comm, {DECODER: member})
