"""A lost rank ends the run, with its name and its step.

A collective waits for ever for a process that was killed or stopped, and a main thread that waits there runs
no Python: no handler of a signal, no timeout of ours. So a thread of every rank beats once a second to rank 0
(``weft.parallel.pulse``), and rank 0 to every rank. It ends the process when

- a rank's connection ends without a word: it was killed or it crashed;
- a rank is silent: it is stopped, or its host is gone. Where it is ours it is killed, for a stopped process
  holds its memory and its launcher's patience;
- a rank has stopped with an error while this one waits for it;
- no rank gets on, though all beat: every rank prints the stacks of its threads;
- torchrun has gone, or has sent SIGTERM.

Python's lock: an extension that computes without releasing it also stops the beats of its process.
``silence`` must be longer than the longest such call. A debugger that holds a rank looks like a rank that is
lost: debug with ``run.watchdog=0``.
"""

import itertools
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch.distributed as dist

from weft.config.errors import RunError
from weft.parallel.pulse import Beat, Peer, as_line, kill, meet

_GRACE = 2.0  # seconds for a main thread to end by itself; torchrun kills what is left after 30
_FRESH = 0.1  # seconds after which the others know of a change
_LEAVE, _MOVED = b"\0", b"\xff"  # wake the thread; other bytes are numbers of signals
_NAME = "weft-watchdog"  # of our threads
_MEETINGS = itertools.count()  # ranks enter their watchdogs in the same order


@dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
        text: for people.
        lost: the rank to kill, if any.
        stacks: whether every rank shows the stacks of its threads.
        patient: whether ranks may take ``silence`` seconds to find out by themselves, which is quieter.
    """

    text: str
    lost: Beat | None = None
    stacks: bool = False
    patient: bool = False


class Watchdog:
    """Watches the ranks of the default process group while its block runs; one rank alone needs none.

    A collective that breaks inside the block because a rank is lost ends as a ``RunError`` that names it. A
    process that has not left the block two seconds after a verdict is ended.

    Args:
        rank: of this process.
        size: number of ranks.
        silence: seconds without a beat after which a rank counts as lost; 0 is off.
        stall: seconds in which no rank calls ``beat`` after which the run ends; 0 is off.
    """

    def __init__(self, rank: int, size: int, silence: float = 10.0, stall: float = 0.0) -> None:
        self.rank, self.size, self.silence, self.stall = rank, size, silence, stall
        self._tick = min(1.0, silence / 4)
        self._now = ("start", 0, 0)  # phase, step, count; replaced whole, for two threads use it
        self._peers: dict[int, Peer] = {}
        self._still = 0  # ticks in which no rank got on
        self._counts: list[int] = []
        self._verdict: Verdict | None = None
        self._deadline = float("inf")
        self._code = 1
        self._told = self._moved = False
        self._due = float("inf")  # when the others are told that this rank has moved
        self._left: str | None = None
        self._known, self._parted = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, phase: str) -> None:
        """Say that this rank gets on: it is in ``phase`` (a word or two) of ``step``; microseconds."""
        self._now = (phase, step, self._now[2] + 1)
        if self._thread and not self._moved:
            self._moved = True
            self._waker.send(_MOVED)

    def __enter__(self) -> "Watchdog":
        if self.size == 1 or not self.silence:
            return self
        self._own = Beat.own(self.rank)
        self._peers = meet(self._own, self.size, f"weft/watchdog/{next(_MEETINGS)}")
        self._parent = os.getppid() if dist.is_torchelastic_launched() else 0
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            self._selector.register(peer.link, selectors.EVENT_READ, partial(self._hear, peer))
        self._waker, woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ, partial(self._wake, woken))
        self._sockets = (self._waker, woken)
        self._restore = self._catch()
        self._thread = threading.Thread(target=self._watch, name=_NAME, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        broken = isinstance(error, RuntimeError)  # c10d's errors are; ours are not
        if broken:
            self._known.wait(_GRACE)  # a collective breaks a moment before or after the verdict
        verdict, self._thread = self._verdict, None
        self._left = f"{type(error).__name__}: {error}" if error else ""
        self._waker.send(_LEAVE)
        self._parted.wait(2 * _GRACE)
        self._restore()
        for end in self._sockets if self._parted.is_set() else ():
            end.close()
        if verdict and broken:
            raise RunError(verdict.text) from error

    def _catch(self) -> Callable[[], None]:
        """Let SIGTERM wake our thread, where nobody else handles it; returns what undoes this.

        The interpreter writes the signal's number to a socket as the signal arrives, in whichever thread;
        blocking the signal instead would leave out the threads that run already.
        """
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return lambda: None
        before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)

        def restore() -> None:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        return restore

    def _watch(self) -> None:
        """The thread."""
        tick = time.monotonic() + self._tick
        parting = 0
        while parting * self._tick < _GRACE and not (self._left is not None and not self._peers):
            for key, _ in self._selector.select(max(0.0, min(tick, self._due) - time.monotonic())):
                key.data()
            if time.monotonic() >= self._due:
                self._due, self._moved = float("inf"), False
                self._tell({"beat": asdict(self._stand())})
            if (now := time.monotonic()) >= tick:
                tick = now + self._tick  # of ticks missed while this process was stopped, one counts
                parting += self._left is not None
                self._look(now)
        self._selector.close()
        self._parted.set()
        if self._left and self._verdict and not self._verdict.patient:
            time.sleep(max(0.0, self._deadline - time.monotonic()))
            self._end()

    def _wake(self, woken: socket.socket) -> None:
        signals = woken.recv(64)
        if signal.SIGTERM in signals:
            self._code = 128 + signal.SIGTERM
            self._deadline = min(self._deadline, time.monotonic() + _GRACE)  # for the verdict behind it
        if _MOVED[0] in signals:
            self._due = min(self._due, time.monotonic() + _FRESH)
        if _LEAVE[0] in signals:
            self._tell({"beat": asdict(self._stand())})

    def _tell(self, message: dict[str, Any]) -> None:
        line = as_line(message)
        for peer in self._peers.values():
            peer.tell(line)

    def _stand(self) -> Beat:
        phase, step, count = self._now
        return replace(self._own, phase=phase, step=step, count=count, left=self._left)

    def _hear(self, peer: Peer) -> None:
        """Take in what a rank says."""
        messages = peer.hear()
        if messages is None:
            self._drop(peer)
            if self._left is None:
                text = f"{peer.beat} was killed or crashed, last seen {peer.beat.where}"
                self._judge(Verdict(text, peer.beat))
            return
        peer.silent = 0
        for message in messages:
            if "verdict" in message:
                told = message["verdict"]
                lost = told.pop("lost")
                self._judge(Verdict(lost=Beat(**lost) if lost else None, **told))
            elif "beat" in message:
                peer.beat = Beat(**message["beat"])
        if peer.beat.left is not None:
            self._drop(peer)
            if peer.beat.left:
                text = f"{peer.beat} stopped {peer.beat.where}: {peer.beat.left}"
                self._judge(Verdict(text, patient=True))

    def _drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.link)
        peer.link.close()
        del self._peers[peer.beat.rank]

    def _look(self, now: float) -> None:
        """What is due at every tick."""
        if self._left is not None:
            return
        self._tell({"beat": asdict(self._stand())})
        for peer in self._peers.values():
            peer.silent += 1
            if peer.silent * self._tick > self.silence:
                text = f"{peer.beat} does not answer since {self.silence:g} s, last seen {peer.beat.where}"
                self._judge(Verdict(text, peer.beat))
        if self.rank == 0:
            self._look_for_stall()
        if self._parent and os.getppid() != self._parent:
            self._judge(Verdict(f"torchrun (process {self._parent} on {self._own.host}) has gone"))
        if now >= self._deadline:
            self._end()

    def _look_for_stall(self) -> None:
        beats = [self._stand(), *(peer.beat for peer in self._peers.values())]
        counts = [beat.count for beat in beats]
        self._still = self._still + 1 if counts == self._counts else 0
        self._counts = counts
        if self.stall and self._still * self._tick > self.stall:
            places: dict[str, list[int]] = {}
            for beat in sorted(beats, key=lambda beat: (beat.step, beat.rank)):
                places.setdefault(beat.where, []).append(beat.rank)
            where = "; ".join(f"{_ranges(ranks)} {place}" for place, ranks in places.items())
            self._judge(Verdict(f"no rank has moved for {self.stall:g} s: {where}", stacks=True))

    def _judge(self, verdict: Verdict) -> None:
        """The run ends; the first verdict counts."""
        if self._verdict:
            return
        self._verdict = verdict
        self._tell({"verdict": asdict(verdict)})
        grace = self.silence if verdict.patient else _GRACE
        self._deadline = min(self._deadline, time.monotonic() + grace)
        if verdict.lost:
            kill(verdict.lost)
        if not verdict.patient:
            _within(_GRACE, self._say)
        self._known.set()

    def _say(self) -> None:
        """Tell people, once."""
        if not self._told:
            self._told = True
            text = self._verdict.text if self._verdict else "SIGTERM"
            lines = [f"{self._stand().where}: {text}; stopping"]
            lines += _stacks() if self._verdict and self._verdict.stacks else []
            said = "".join(f"weft: rank {self.rank} {line}\n" for line in lines)
            os.write(2, said.encode())  # not by sys.stderr, whose lock the main thread may hold

    def _end(self) -> None:
        """End the process, whatever its main thread does."""
        self._left = self._verdict.text if self._verdict else "SIGTERM"
        self._tell({"beat": asdict(self._stand())})
        _within(_GRACE, self._say)
        _within(_GRACE, sys.stdout.flush)
        os._exit(self._code)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do ``work``, or give up waiting for it: a pipe that nobody reads must not keep us."""
    worker = threading.Thread(target=work, name=_NAME, daemon=True)
    worker.start()
    worker.join(seconds)


def _stacks() -> list[str]:
    """Where every thread of this process stands, ours apart, as lines."""
    frames = sys._current_frames()
    lines: list[str] = []
    for thread in threading.enumerate():
        if thread.name != _NAME and thread.ident in frames:
            lines.append(f"thread {thread.name}, innermost call last:")
            lines += "".join(traceback.format_stack(frames[thread.ident])).splitlines()
    return lines


def _ranges(ranks: list[int]) -> str:
    """``ranks 0-2, 5``: ascending ranks, for people."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"
