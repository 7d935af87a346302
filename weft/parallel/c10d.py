"""Ranks as processes of torch.distributed, and the bytes that its operations move."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from weft.parallel.collectives import Collectives, Family, Listener, received
from weft.parallel.comm import Comm

# torch 2.13 renamed these two and warns at the old names, the only ones that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class C10dComm(Collectives):
    """Ranks of a torch.distributed process group; all ranks by default.

    Device tensors travel by the group's backend for the device (NCCL), host values always by Gloo: a group
    that reduces CUDA tensors must have both (``cpu:gloo,cuda:nccl``).

    Args:
        group: the ranks.
        timeout: seconds a collective of a sub-group may take.
        family: shared with the communicator this one was made from.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, timeout: float = 1800.0, family: Family | None = None
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_process_group_ranks(group), family)
        self._group, self._timeout = group, timeout
        self._turns: Counter[tuple[Any, int]] = Counter()  # transfers so far, by direction and peer

    def _exchange(self, op: str, source: Tensor, out: Tensor) -> Callable[[], object]:
        work: Any
        if op == "all_reduce":
            work = dist.all_reduce(out, group=self._group, async_op=True)
        elif op == "all_gather":
            work = _all_gather(out, source, group=self._group, async_op=True)
        elif op == "reduce_scatter":
            work = _reduce_scatter(out, source, group=self._group, async_op=True)
        else:
            work = dist.all_to_all_single(out, source, group=self._group, async_op=True)
        return work.wait

    def _exchange_v(
        self, source: Tensor, out: Tensor, send: list[int], receive: list[int]
    ) -> Callable[[], object]:
        work: Any = dist.all_to_all_single(out, source, receive, send, group=self._group, async_op=True)
        return work.wait

    def _transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], object]:
        """Of bytes, for NCCL does not know every dtype."""
        operations = [
            (way, tensor.view(torch.uint8), peer, self._turn(way, peer))
            for way, tensors in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in tensors.items()
        ]
        works: list[Any]
        if all(tensor.is_cpu for _, tensor, *_ in operations):  # a third of the time of a batch
            peers = {dist.irecv: "group_src", dist.isend: "group_dst"}
            works = [
                way(tensor, group=self._group, tag=tag, **{peers[way]: peer})
                for way, tensor, peer, tag in operations
            ]
        else:  # NCCL may connect single operations pair by pair
            together = [
                dist.P2POp(way, tensor, group=self._group, tag=tag, group_peer=peer)
                for way, tensor, peer, tag in operations
            ]
            works = dist.batch_isend_irecv(together)
        return lambda: [work.wait() for work in works]

    def _turn(self, way: Any, peer: int) -> int:
        """A tag, by which Gloo tells transfers under way apart."""
        self._turns[way, peer] += 1
        return self._turns[way, peer] % _TAGS

    def _split(self, rank: int, ranks: tuple[int, ...], name: str) -> Comm:
        group = _new_group(rank, ranks, dist.get_backend_config(self._group), self._timeout, name)
        return C10dComm(group, self._timeout, self.family)

    def twin(self) -> Comm:
        """A Gloo group of its own."""
        return C10dComm(_new_group(self.rank, self.ranks, "gloo", self._timeout), self._timeout)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Tell ``listener`` of every operation of torch.distributed that this thread runs, whoever calls it.

        CPU backward passes run on the calling thread and are heard too.
        """
        with super().listening(listener), _Watch(self.family, listener):
            yield


def _new_group(
    rank: int, ranks: Sequence[int], backend: str, timeout: float, name: str = ""
) -> dist.ProcessGroup:
    """A process group that its members make without the other ranks.

    ``dist.new_group(..., use_local_synchronization=True)`` has in the name of a group the number of groups
    that the process made before, so members that made different numbers wait for each other for ever; it
    also sorts the ranks. Here the name tells the members and how many groups they made together before,
    for each ``name``.
    """
    world = distributed_c10d._world
    make: Any = distributed_c10d._new_process_group_helper
    told = f"{tuple(ranks)}{name}".encode()
    prefix = f"weft-{hashlib.sha1(told, usedforsecurity=False).hexdigest()}-"
    made = sum(name.startswith(prefix) for name in world.pg_names.values())
    group, _ = make(
        len(ranks),
        rank,
        list(ranks),
        dist.Backend(backend),
        distributed_c10d._get_default_store(),
        f"{prefix}{made}",
        timeout=timedelta(seconds=timeout),
    )
    world.pg_group_ranks[group] = {member: place for place, member in enumerate(ranks)}
    return group


class _Watch(TorchDispatchMode):
    """Hears the c10d operations that really run."""

    def __init__(self, family: Family, listener: Listener) -> None:
        super().__init__()
        self._family, self._listener = family, listener

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name == "send":
                return func(*args, **(kwargs or {}))
            if name not in _OPERATIONS:
                raise NotImplementedError(f"the ledger does not know the bytes of c10d.{name}")
            op, group, whole = _OPERATIONS[name]
            group = dist.ProcessGroup.unbox(args[group])
            ranks = tuple(dist.get_process_group_ranks(group))
            if op == "all_to_all" and args[3]:  # elements from each rank
                own = args[3][dist.get_rank(group)]
                count = args[0].nbytes - own * args[0].nbytes // max(1, len(args[0]))
            else:
                count = whole(*args) if op == "transfer" else received(op, len(ranks), whole(*args))
            self._listener(op, ranks, count, self._family.metadata)
        return func(*args, **(kwargs or {}))


_Operation = tuple[str, int, Callable[..., int]]
_OPERATIONS: dict[str, _Operation] = {
    "allreduce_": ("all_reduce", 1, lambda tensors, *_: sum(tensor.nbytes for tensor in tensors)),
    "_allgather_base_": ("all_gather", 2, lambda out, source, *_: out.nbytes),
    "_reduce_scatter_base_": ("reduce_scatter", 2, lambda out, source, *_: source.nbytes),
    "alltoall_base_": ("all_to_all", 2, lambda out, source, *_: source.nbytes),
    "recv_": ("transfer", 1, lambda tensors, *_: sum(tensor.nbytes for tensor in tensors)),
}
"""Per operation: its name in a ledger, the place of the group in its arguments, bytes of the full buffer."""
_TAGS = 1 << 30  # of transfers between two ranks: tags have 31 bits
