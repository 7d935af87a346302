"""The communicator: one small interface, three back ends.

Objects travel as JSON text, in every back end: nothing is ever unpickled, and what cannot travel between
processes does not travel between threads either.
"""

import json
import threading
from collections.abc import Callable
from functools import reduce
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


@runtime_checkable
class Comm(Protocol):
    """A group of ranks that compute together."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank gets the same bits."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in rank order, on every rank; tuples come back as lists.

        Raises:
            TypeError: not a JSON value (a fault of the caller).
        """
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def twin(self) -> "Comm":
        """The same ranks apart from this communicator, for another thread; it carries host values only."""
        ...


class SingleComm:
    """One rank: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Only our own value."""
        return [json.loads(json.dumps(value))]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def twin(self) -> Comm:
        """Itself: there is nothing to mix up."""
        return self


class _Exchange:
    """A board on which the threads of a group lay values for one another."""

    def __init__(self, size: int, timeout: float) -> None:
        self.timeout = timeout
        self.board: list[Any] = [None] * size
        self.gate = threading.Barrier(size, timeout=timeout)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.board[rank] = value
        self.gate.wait()
        values = list(self.board)
        self.gate.wait()  # nobody writes the next value before all have read this one
        return values


class ThreadComm:
    """N ranks as N threads of one process: breadth in seconds."""

    def __init__(self, rank: int, size: int, exchange: _Exchange) -> None:
        self.rank, self.size, self._exchange = rank, size, exchange

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum in rank order, so that all ranks get the same bits."""
        return tensor.copy_(reduce(torch.add, self._exchange.swap(self.rank, tensor.detach().clone())))

    def gather_objects(self, value: Any) -> list[Any]:
        """Values in rank order."""
        return [json.loads(text) for text in self._exchange.swap(self.rank, json.dumps(value))]

    def barrier(self) -> None:
        """Wait for all threads."""
        self._exchange.swap(self.rank, None)

    def twin(self) -> Comm:
        """The same threads over a board of its own."""
        board = _Exchange(self.size, self._exchange.timeout) if self.rank == 0 else None
        return ThreadComm(self.rank, self.size, self._exchange.swap(self.rank, board)[0])


class C10dComm:
    """Ranks of a torch.distributed process group; all ranks by default.

    Device tensors travel by the group's backend for the device (NCCL), host values always by Gloo: a group
    that reduces CUDA tensors must have both (``cpu:gloo,cuda:nccl``).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Values in rank order: lengths first, then the texts, filled up to the longest."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._gather(torch.tensor([len(text)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = zip(self._gather(padded), lengths, strict=True)
        return [json.loads(bytes(text[:length].tolist())) for text, length in texts]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor, group=self._group)
        return everyone

    def barrier(self) -> None:
        """Wait for the hosts of the group; work queued on a GPU is not waited for."""
        dist.all_reduce(torch.zeros(()), group=self._group)

    def twin(self) -> Comm:
        """A Gloo group of its own."""
        ranks = dist.get_process_group_ranks(self._group)
        group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return C10dComm(cast(dist.ProcessGroup, group))  # a number only for ranks outside the group


def run_threads(size: int, work: Callable[[Comm], Any], timeout: float = 60.0) -> list[Any]:
    """Run ``work(comm)`` on ``size`` threads; results in rank order; the first error is raised."""
    exchange = _Exchange(size, timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, size, exchange))
        except BaseException as error:  # noqa: BLE001 - carried to the caller below
            errors.append(error)
            exchange.gate.abort()

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
