"""Ranks as threads of one process: breadth in seconds."""

import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from weft.parallel.collectives import Collectives, Family
from weft.parallel.comm import Comm, SingleComm

GRACE = 5.0  # seconds that the other threads have to end after one has failed


class _Slot:
    """What the members of a group lay down for one collective."""

    def __init__(self, size: int) -> None:
        self.values: dict[int, Any] = {}
        self.kinds: dict[int, str] = {}
        self.readers = size
        self.merged: Any = None


class _Board:
    """Where the members of a group lay values for one another; laying down never waits."""

    def __init__(self, gang: "_Gang", ranks: tuple[int, ...]) -> None:
        self.gang, self.ranks = gang, ranks
        self.changed = threading.Condition()
        self._turns = [0] * len(ranks)
        self._slots: dict[int, _Slot] = {}
        self._sent, self._asked = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        self._mail: dict[tuple[int, int, int], Tensor] = {}  # source, target, turn

    def lay(self, place: int, kind: str, value: Any) -> int:
        """Lay a value down; the turn under which all are collected."""
        with self.changed:
            turn = self._turns[place]
            self._turns[place] += 1
            slot = self._slots.setdefault(turn, _Slot(len(self.ranks)))
            slot.values[place], slot.kinds[place] = value, kind
            if len(slot.values) == len(self.ranks):
                self.changed.notify_all()
        return turn

    def collect(self, turn: int, merge: Callable[[list[Any]], Any]) -> Any:
        """``merge`` of the values of all members, computed once for all of them.

        Raises:
            threading.BrokenBarrierError: another thread has failed.
            TimeoutError: names the ranks that did not arrive.
            RuntimeError: members called different collectives.
        """
        with self.changed:
            slot = self._slots[turn]
            if self._comes(lambda: len(slot.values) == len(self.ranks)):
                return self._read(turn, slot, merge)
            kind = next(iter(slot.kinds.values()))
            absent = [rank for place, rank in enumerate(self.ranks) if place not in slot.values]
        self.gang.show_stacks()
        raise TimeoutError(
            f"ranks {absent} did not arrive within {self.gang.timeout:g} s at the {kind} "
            f"of ranks {list(self.ranks)}"
        )

    def _comes(self, there: Callable[[], bool]) -> bool:
        """Whether what is waited for comes in time."""
        came = self.changed.wait_for(lambda: self.gang.failed or there(), self.gang.timeout)
        if self.gang.failed:
            raise threading.BrokenBarrierError
        return came

    def send(self, place: int, target: int, value: Tensor) -> None:
        """Lay down the next tensor from one place to another."""
        with self.changed:
            turn = self._sent[place, target]
            self._sent[place, target] += 1
            self._mail[place, target, turn] = value
            self.changed.notify_all()

    def ask(self, source: int, place: int) -> int:
        """The turn of the next tensor that comes to ``place`` from ``source``."""
        with self.changed:
            self._asked[source, place] += 1
            return self._asked[source, place] - 1

    def fetch(self, source: int, place: int, turn: int, out: Tensor) -> None:
        """Fill ``out`` with the tensor of that turn; errors as those of ``collect``."""
        key, sender, own = (source, place, turn), self.ranks[source], self.ranks[place]
        with self.changed:
            if self._comes(lambda: key in self._mail):
                value = self._mail.pop(key)
                if (len(value), value.dtype) != (len(out), out.dtype):
                    raise RuntimeError(
                        f"rank {own} expects {_form(out)} from rank {sender}, but is sent {_form(value)}"
                    )
                out.copy_(value)
                return
        self.gang.show_stacks()
        raise TimeoutError(
            f"rank {sender} did not send within {self.gang.timeout:g} s what rank {own} waits for: transfer "
            f"{turn} of {_form(out)} in ranks {list(self.ranks)}"
        )

    def _read(self, turn: int, slot: _Slot, merge: Callable[[list[Any]], Any]) -> Any:
        if len(set(slot.kinds.values())) > 1:
            calls = "; ".join(
                f"rank {self.ranks[place]}: {slot.kinds[place]}" for place in sorted(slot.kinds)
            )
            raise RuntimeError(f"ranks {list(self.ranks)} do not call the same collective: {calls}")
        if slot.merged is None:
            slot.merged = merge([slot.values[place] for place in range(len(self.ranks))])
        slot.readers -= 1
        if not slot.readers:
            del self._slots[turn]
        return slot.merged


class _Gang:
    """The threads that run together, and the boards they use."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.failed = False
        self.threads: dict[int, int] = {}
        self._boards: dict[Any, _Board] = {}
        self._lock = threading.Lock()
        self._shown = False

    def board(self, lineage: tuple[Any, ...], ranks: tuple[int, ...]) -> _Board:
        with self._lock:
            return self._boards.setdefault((lineage, ranks), _Board(self, ranks))

    def fail(self) -> None:
        """Release every thread from whatever board it waits at."""
        with self._lock:
            self.failed = True
            boards = list(self._boards.values())
        for board in boards:
            with board.changed:
                board.changed.notify_all()

    def show_stacks(self) -> None:
        """Write where every rank is to stderr, once."""
        with self._lock:
            if self._shown:
                return
            self._shown = True
        frames = sys._current_frames()
        for ident, rank in sorted(self.threads.items(), key=lambda pair: pair[1]):
            if ident in frames:
                stack = "".join(traceback.format_stack(frames[ident]))
                sys.stderr.write(f"[rank {rank}] is at\n{stack}")


class ThreadComm(Collectives):
    """Ranks as threads of a gang; made by ``run_threads``."""

    def __init__(
        self,
        gang: _Gang,
        rank: int,
        ranks: Sequence[int],
        family: Family | None = None,
        lineage: tuple[Any, ...] = (),
        name: str = "",
    ) -> None:
        super().__init__(rank, ranks, family)
        self._gang, self._lineage, self._name, self._twins = gang, lineage, name, 0
        self._board = gang.board((*lineage, name), self.ranks)

    def _exchange(self, op: str, source: Tensor, out: Tensor) -> Callable[[], object]:
        self.note_whole(op, max(source.nbytes, out.nbytes))
        kind = f"{op} of {_form(source)}"
        turn = self._board.lay(self.rank, kind, source.clone())

        def rows(values: list[Tensor]) -> list[Tensor]:
            return [value.view(self.size, -1)[self.rank] for value in values]

        def finish() -> None:
            if op == "all_reduce":
                out.copy_(self._board.collect(turn, _total))
                return
            values = self._board.collect(turn, list)
            if op == "all_gather":
                torch.cat(values, out=out)
            elif op == "reduce_scatter":
                out.copy_(_total(rows(values)))
            else:
                torch.cat(rows(values), out=out)

        return finish

    def _exchange_v(
        self, source: Tensor, out: Tensor, send: list[int], receive: list[int]
    ) -> Callable[[], object]:
        self.note_parts(out, receive)
        kind = f"uneven all_to_all of {str(source.dtype).removeprefix('torch.')}"
        turn = self._board.lay(self.rank, kind, source.clone().split(send))

        def finish() -> None:
            parts = [values[self.rank] for values in self._board.collect(turn, list)]
            lengths = [len(part) for part in parts]
            if lengths != receive:
                raise RuntimeError(f"rank {self.rank} expects {receive} elements, but is sent {lengths}")
            torch.cat(parts, out=out)

        return finish

    def _transfer(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], object]:
        self.note_received(receives)
        for peer, tensor in sends.items():
            self._board.send(self.rank, peer, tensor.clone())
        turns = {peer: self._board.ask(peer, self.rank) for peer in receives}

        def finish() -> None:
            for peer, tensor in receives.items():
                self._board.fetch(peer, self.rank, turns[peer], tensor)

        return finish

    def _split(self, rank: int, ranks: tuple[int, ...], name: str) -> Comm:
        return ThreadComm(self._gang, rank, ranks, self.family, self._lineage, name)

    def twin(self) -> Comm:
        """The same threads over boards of their own."""
        self._twins += 1
        lineage = (*self._lineage, self.ranks, self._name, self._twins)
        return ThreadComm(self._gang, self.rank, self.ranks, lineage=lineage)


def _form(tensor: Tensor) -> str:
    """Such as ``3 float32``."""
    return f"{tensor.numel()} {str(tensor.dtype).removeprefix('torch.')}"


def _total(values: list[Tensor]) -> Tensor:
    """Sum in rank order, so that all ranks get the same bits."""
    return reduce(torch.add, values)


def run_threads(size: int, work: Callable[[Comm], Any], timeout: float = 60.0) -> list[Any]:
    """Run ``work(comm)`` on ``size`` threads; results in rank order.

    Args:
        size: number of ranks.
        work: the program of every rank.
        timeout: seconds that a rank waits for the others in a collective.

    Raises:
        BaseException: the first error of any rank. All others are released from the collectives in which they
            wait; a thread that does not end soon after is left behind.
        TimeoutError: ranks did not arrive at a collective; the stack of every rank is on stderr.
    """
    gang = _Gang(timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        gang.threads[threading.get_ident()] = rank
        try:
            results[rank] = work(SingleComm() if size == 1 else ThreadComm(gang, rank, range(size)))
        except BaseException as error:  # noqa: BLE001 - carried to the caller below
            errors.append(error)
            gang.fail()

    names = [f"rank{rank}" for rank in range(size)]
    threads = [
        threading.Thread(target=body, args=(rank,), name=name, daemon=True) for rank, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not gang.failed:
            thread.join(0.2)
        thread.join(GRACE)
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
