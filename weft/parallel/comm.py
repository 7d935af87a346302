"""The communicator: one small interface, three back ends."""

import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

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
        """The plain Python value of every rank, in rank order, on every rank."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def twin(self) -> "Comm":
        """The same ranks apart from this communicator, for the use of another thread."""
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
        return [value]

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
        first, *rest = self._exchange.swap(self.rank, tensor.detach().clone())
        return tensor.copy_(sum(rest, start=first))

    def gather_objects(self, value: Any) -> list[Any]:
        """Values in rank order."""
        return self._exchange.swap(self.rank, value)

    def barrier(self) -> None:
        """Wait for all threads."""
        self._exchange.swap(self.rank, None)

    def twin(self) -> Comm:
        """The same threads over a board of its own."""
        board = _Exchange(self.size, self._exchange.timeout) if self.rank == 0 else None
        return ThreadComm(self.rank, self.size, self._exchange.swap(self.rank, board)[0])


class C10dComm:
    """Ranks of a torch.distributed process group (Gloo on CPU, NCCL on GPU); all ranks by default."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the group."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Values in rank order; only plain Python values of our own making travel here."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait for the group."""
        dist.barrier(group=self._group)

    def twin(self) -> Comm:
        """A process group of its own."""
        return C10dComm(dist.new_group())


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
