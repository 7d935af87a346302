"""How parameters rest between uses: whole, or cut over ranks (ZeRO, arXiv 1910.02054), by level.

    0  everything whole on every rank
    1  optimizer state and master values cut; gradients are reduced and parameters gathered once per step
    2  gradients too: those of a unit are reduced as soon as its backward pass is over
    3  parameters too: those of a unit are whole between ``gather`` and ``free`` only

The gradient of every box is the sum over all ranks that hold it: a reduce-scatter over the store group, then
an all-reduce over the ranks with the same part. Under bf16 a float32 master copy rests beside the parameters,
and gradients add up in float32.

Collectives of units are asynchronous: on a GPU they run on the streams of their communicator. All ranks of a
store group use the same units in the same order; one without tokens runs with zero tokens.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.parallel.comm import Pending, SingleComm
from weft.parallel.flat import Flat, Section, Slot, Stored, aligned, copies, slots
from weft.parallel.mesh import Mesh, mesh_of
from weft.parallel.units import Divided, Foresight, unit_of, watch
from weft.plan.layout import Layout
from weft.spec.layout import PlanConfig
from weft.spec.param import ParamSpec
from weft.spec.precision import PRECISIONS

Values = Callable[[Flat], Tensor]
"""A tensor like the shard of a flat: its ``master``, its ``grad``, a moment."""


class Store:
    """All trainable parameters of a model, flat; a collective call.

    Args:
        model: the tensors of this rank; one that is not ``Divided`` is one unit.
        specs: its parameters.
        precision: a name of ``PRECISIONS``.
        mesh: the layout; one rank by default.

    Attributes:
        level: of the layout; 0 where only one rank shares a copy.
        names: of the parameters.
        flats: what the optimizer sees.
    """

    def __init__(
        self, model: nn.Module, specs: Iterable[ParamSpec], precision: str, mesh: Mesh | None = None
    ) -> None:
        self.mesh = mesh or mesh_of(PlanConfig(), SingleComm())
        config = self.mesh.layout.store
        roles = (self.mesh.plan.dense, self.mesh.plan.experts)
        self._comms = {id(layout): self.mesh.store(layout) for layout in roles}
        self.level = config.level if any(comm.size > 1 for comm in self._comms.values()) else 0
        self.master_dtype: torch.dtype = getattr(torch, PRECISIONS[precision].master)
        self._copies = lru_cache(
            lambda layout, positions, places: copies(self.mesh.rank, layout, positions, places)
        )
        here = [s for s in specs if not s.buffer and self.mesh.has(s.name)]
        self._params = {s.name: (s, model.get_parameter(s.name)) for s in here}
        self.names = tuple(self._params)
        units = model.units() if self.level > 1 and isinstance(model, Divided) else {"": model}
        self._sections: dict[str, list[tuple[Flat, Section]]] = {unit: [] for unit in units}
        alike = self._alike(units)
        self.flats = [self._flat(*members) for members in alike.values()]
        self._stages = [stage for *_, stage in alike]
        self._summing: dict[int, Callable[[], None]] = {}  # flats whose gradients are being summed
        self._moving: list[tuple[Tensor, Pending]] = []
        self._open: dict[Hashable, Counter[str]] = {}  # uses whose gradients are to come, by pass
        self._held: Counter[str] = Counter()  # uses that need the parameters now
        self._here: dict[str, list[Pending]] = {}  # units with memory, and what they still wait for
        self._ahead: tuple[str, ...] = ()
        self._foresight = Foresight(config.prefetch)
        self._key: Hashable = None
        self._late = False
        if self.level > 1:
            owners = {id(param): unit_of(name, units) for name, (_, param) in self._params.items()}
            watch(model, units, owners, self)

    def _alike(self, units: Iterable[str]) -> dict[Any, tuple[Layout, dict[str, list[ParamSpec]]]]:
        """Specs by role, by what the optimizer does with them and by unit, units in their order."""
        found: dict[Any, tuple[Layout, dict[str, list[ParamSpec]]]] = {}
        for name, (spec, param) in self._params.items():
            layout = self.mesh.plan.of(spec)
            key = id(layout), spec.decay, param.dtype, self._stage(name)
            _, members = found.setdefault(key, (layout, {unit: [] for unit in units}))
            members[unit_of(name, units)].append(spec)
        return found

    def _stage(self, name: str) -> str | None:
        """The stage whose passes give all gradients of a parameter; None if there are several."""
        cut = self.mesh.plan.cut
        stages = [str(i) for i, piece in enumerate(cut.pieces) if piece.has(name)] if cut else []
        if len(stages) > 1:  # a token table, which lies alike on all pipeline ranks that have it
            return None
        return stages[0] if stages and self.level < 2 else ""  # above, units do not wait for their stage

    def _flat(self, layout: Layout, members: dict[str, list[ParamSpec]]) -> Flat:
        sections: dict[str, Section] = {}
        spec = next(specs for specs in members.values() if specs)[0]
        dtype, comm = self._params[spec.name][1].dtype, self._comms[id(layout)]
        parts: list[Tensor] = []
        for unit, specs in members.items():
            if specs:
                sections[unit] = section = self._section(specs, layout, sum(map(len, parts)))
                parts.append(section.own() if self.level == 0 else section.own().clone())
                if self.level == 3:
                    section.resize(0)
        shard = parts[0] if self.level == 0 else torch.cat(parts)
        master = shard if dtype == self.master_dtype else shard.to(self.master_dtype)
        grad = next(iter(sections.values())).total if self.level == 0 else torch.zeros_like(master)
        flat = Flat(self.mesh.rank, comm, spec.decay, list(sections.values()), shard, master, grad)
        for unit, section in sections.items():
            self._sections[unit].append((flat, section))
        return flat

    def _section(self, specs: list[ParamSpec], layout: Layout, start: int) -> Section:
        """Move parameters into one buffer."""
        comm = self._comms[id(layout)]
        positions = self.mesh.plan.positions(specs[0].name)
        places = slots(specs, self.mesh, partial(self._copies, layout, positions))
        params = [self._params[spec.name][1] for spec in specs]
        for box in (box for slot in places for box in slot.boxes if box.box.numel):
            self.mesh.comm.group(box.ranks)  # made now, by all their members in the same order
        width = aligned(-(-places[-1].end // comm.size))
        compute = params[0].detach().new_zeros(width * comm.size)
        total = torch.zeros_like(compute, dtype=self.master_dtype) if self.level < 2 else compute.new_zeros(0)
        section = Section(places, params, comm.rank * width, width, start, compute, total)
        for param, view in zip(params, section.views(compute), strict=True):
            param.data = view.copy_(param.detach())
        if self.level < 2:
            for param, view in zip(params, section.views(total), strict=True):
                if param.dtype == view.dtype:
                    param.grad = view  # autograd adds into it in place
                else:
                    param.register_post_accumulate_grad_hook(_adder(view))
        return section

    # What a schedule calls, or else the hooks of units.

    def gather(self, unit: str, learn: bool = True) -> None:
        """Make the parameters of a unit whole until as many calls of ``free``; begin with those that come.

        Args:
            unit: its name.
            learn: the use comes again at the same point of the next microbatch.
        """
        if self.level < 3:
            return
        self._hold(unit)
        before, self._ahead = self._ahead, self._foresight.use(unit, learn)
        for other in before:
            self._drop(other)
        for other in self._ahead:
            self._fetch(other)
        self._arrive(unit)

    def free(self, unit: str) -> None:
        """Give back the memory of a unit's parameters, unless another use needs them or soon will."""
        if self._held[unit]:
            self._held[unit] -= 1
            self._drop(unit)

    def enter(self, key: Hashable, late: bool = False) -> None:
        """A forward or backward pass begins.

        Args:
            key: names the forward pass, also where its backward pass begins.
            late: gradients of weights come after the backward pass, at the latest before ``end_pass``.
        """
        self._key, self._late = key, late

    def begin(self, unit: str) -> Hashable:
        """A use of a unit begins that will give gradients; the pass."""
        self._open.setdefault(self._key, Counter())[unit] += 1
        return self._key

    def finish(self, unit: str, key: Hashable) -> None:
        """The backward pass of a use is over; the last one of a unit's uses in the pass reduces it."""
        uses = self._open[key]
        uses[unit] -= 1
        if not uses[unit] and not self._late:  # autograd hands gradients of all uses over at once
            self._reduce_unit(unit, key)

    def _reduce_unit(self, unit: str, key: Hashable) -> None:
        """Begin to sum the gradients of a unit over the store group."""
        if self.level < 2:
            return
        del self._open[key][unit]
        self._settle()
        for flat, section in self._sections[unit]:
            rows = section.take_gradients(self.master_dtype).view(flat.comm.size, -1)
            self._moving.append((section.part(flat.grad), flat.comm.start_reduce_scatter(rows)))

    def end_pass(self, key: Hashable = None) -> None:
        """All gradients of a pass are there: reduce what is left."""
        for unit in list(self._open.get(key, ())):
            self._reduce_unit(unit, key)
        self._open.pop(key, None)

    def rest(self) -> None:
        """The uses of a step are over: give back what was gathered ahead."""
        self._forget()
        self._foresight.end()

    def hold(self, units: Iterable[str]) -> None:
        """Begin to make units whole; they stay so until as many calls of ``release``."""
        for unit in units if self.level == 3 else ():
            self._hold(unit)

    def release(self, units: Iterable[str]) -> None:
        """The end of ``hold``."""
        for unit in units if self.level == 3 else ():
            self.free(unit)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters are whole inside, for what reads them outside of units; a collective call."""
        units = list(self._sections) if self.level == 3 else []
        self.hold(units)
        for unit in units:
            self._arrive(unit)
        try:
            yield
        finally:
            self.release(units)

    def _hold(self, unit: str) -> None:
        self._held[unit] += 1
        self._fetch(unit)

    def _fetch(self, unit: str) -> None:
        """Begin to gather, if nobody has."""
        if unit in self._here:
            return
        self._here[unit] = []
        for flat, section in self._sections[unit]:
            section.resize(section.compute.numel())
            self._here[unit].append(self._spread(flat, section))

    def _spread(self, flat: Flat, section: Section) -> Pending:
        return flat.comm.start_all_gather(section.part(flat.shard), section.compute)

    def _arrive(self, unit: str) -> None:
        for pending in self._here[unit]:
            pending.wait()
        self._here[unit].clear()

    def _drop(self, unit: str) -> None:
        if unit in self._here and not self._held[unit] and unit not in self._ahead:
            self._arrive(unit)
            del self._here[unit]
            for _, section in self._sections[unit]:
                section.resize(0)

    def _forget(self) -> None:
        """No use is under way, and none is expected."""
        self._held.clear()
        self._ahead = ()
        for unit in list(self._here):
            self._drop(unit)

    def _settle(self) -> None:
        for part, pending in self._moving:
            part += pending.wait()
        self._moving.clear()

    # What a training step calls.

    def zero_grad(self) -> None:
        """Forget the gradients, and whatever a step that failed has left."""
        self._moving.clear()
        self._summing.clear()
        self._open.clear()
        self._forget()
        for flat in self.flats:
            flat.grad.zero_()
            for section in flat.sections:
                section.total.zero_()
                for param in section.params if self.level > 1 else ():
                    param.grad = None

    def reduce(self) -> None:
        """Sum the gradients of a step over ranks, after its last pass."""
        for key in list(self._open):
            self.end_pass(key)
        self.rest()
        self._settle()
        self.reduce_stage(*self._stages)
        for summed in self._summing.values():
            summed()
        self._summing.clear()

    def reduce_stage(self, *stages: str | None) -> None:
        """Begin to sum the gradients of stages, all of which are there; above level 1 passes do it."""
        for place, flat in enumerate(self.flats):
            if self._stages[place] in stages and place not in self._summing:
                self._summing[place] = self._sum(flat)

    def _sum(self, flat: Flat) -> Callable[[], None]:
        def copies() -> None:
            for summed in flat.sum_copies(self.mesh.comm.group):
                summed()

        if self.level == 0:
            started = flat.sum_copies(self.mesh.comm.group)
            return lambda: [summed() for summed in started].clear()
        if self.level > 1:
            return copies
        total = flat.sections[0].total  # all units are one
        pending = flat.comm.start_reduce_scatter(total.view(flat.comm.size, -1))

        def finish() -> None:
            flat.grad.copy_(pending.wait())
            copies()

        return finish

    def squares(self) -> Tensor:
        """This rank's part of the squared L2 norm of the gradient: every box of every parameter once."""
        return torch.stack([flat.square() for flat in self.flats]).sum()

    def norm(self) -> Tensor:
        """Global L2 norm of the gradient."""
        return self.mesh.comm.all_reduce(self.squares()).sqrt().to(self.master_dtype)

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradient."""
        for flat in self.flats:
            flat.grad.mul_(factor)

    def adopt(self) -> None:
        """Begin from what was written to ``shard``: copy it to master values and to what layers read."""
        for flat in self.flats:
            if flat.master is not flat.shard:
                flat.master.copy_(flat.shard)
        self.publish()

    def publish(self) -> None:
        """Copy master values to what layers read."""
        self._forget()
        for flat in self.flats:
            if flat.master is not flat.shard:
                flat.shard.copy_(flat.master)
        if self.level in (1, 2):
            pairs = [pair for pairs in self._sections.values() for pair in pairs]
            for pending in [self._spread(*pair) for pair in pairs]:
                pending.wait()

    # What checkpoints and optimizers of whole matrices call.

    def pieces(self, values: Values) -> Iterator[Stored]:
        """The boxes of every parameter that this rank's shards have, in the order of the flats."""
        for flat in self.flats:
            yield from flat.pieces(values(flat))

    def whole(self, name: str, values: Values) -> Tensor:
        """This rank's tensor of a parameter, put together from the store group; a collective call of it."""
        flat, section, slot = self._find(name)
        comm = flat.comm
        edges = [min(max(i * section.width, slot.start), slot.stop) for i in range(comm.size + 1)]
        lengths = [last - first for first, last in zip(edges, edges[1:], strict=False)]
        first = edges[comm.rank] - section.first
        own = section.part(values(flat))[first : first + lengths[comm.rank]]
        row = own.new_zeros(max(lengths))
        row[: len(own)] = own
        rows = comm.all_gather(row)
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]).view(slot.shape)

    def _find(self, name: str) -> tuple[Flat, Section, Slot]:
        for flat in self.flats:
            for section in flat.sections:
                for slot in section.slots:
                    if slot.spec.name == name:
                        return flat, section, slot
        raise KeyError(name)


def _adder(total: Tensor):  # noqa: ANN202 - the hook type torch expects
    def add(param: Tensor) -> None:
        if param.grad is not None:
            total.add_(param.grad)
            param.grad = None

    return add
