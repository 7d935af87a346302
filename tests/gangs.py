"""Gangs of ranks for tests: threads, and Gloo processes that stay for many jobs.

def work(comm, base):  # in tests/some/module.py; returns a JSON value
    return comm.all_reduce(torch.tensor([base])).tolist()

def test_sum(processes):
    assert processes(2).run("tests.some.module:work", {"base": 3}) == [[6], [6]]
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from weft.parallel.threads import run_threads as threads

__all__ = ["GangError", "Gangs", "Processes", "threads"]

ROOT = Path(__file__).parents[1]
START = 120.0  # seconds to import torch in every rank
GRACE = 3.0  # seconds that the other ranks have to answer after one has failed


class GangError(AssertionError):
    """A job failed or hung; the message has the output of every rank, each line with its rank."""


class Processes:
    """Gloo processes that run jobs one after another; started at the first job, and anew after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[_Worker] = []
        self._store: dist.TCPStore | None = None

    def run(
        self,
        target: str,
        arguments: dict[str, Any] | None = None,
        timeout: float = 60.0,
        size: int | None = None,
    ) -> list[Any]:
        """What ``function(comm, **arguments)`` returns on each rank.

        Args:
            target: ``"tests.some.module:function"``.
            arguments: JSON values.
            timeout: seconds for the job; starting the gang does not count.
            size: the first so many ranks only; all by default.

        Raises:
            GangError: a rank failed, died or did not answer in time.
        """
        if not self._workers:
            self._start()
            self.run("tests.gangs:_ready", timeout=START)
        workers = self._workers[: size or self.size]
        for worker in workers:
            worker.send({"target": target, "arguments": arguments or {}, "size": len(workers)})
        answers = _collect(workers, time.monotonic() + timeout)
        if len(answers) < len(workers) or any("error" in answer for answer in answers.values()):
            raise self._failure(workers, answers, f"{target} within {timeout:g} s")
        return [answers[rank]["value"] for rank in range(len(workers))]

    def close(self) -> None:
        """End all ranks."""
        for worker in self._workers:
            worker.end()
        self._workers, self._store = [], None

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._workers = [_Worker.start(rank, self.size, self._store.port) for rank in range(self.size)]

    def _failure(self, workers: "list[_Worker]", answers: dict[int, Any], what: str) -> GangError:
        """End the gang and tell why, with the stacks of the ranks that did not answer."""
        absent = [rank for rank in range(len(workers)) if rank not in answers]
        failed = [rank for rank, answer in sorted(answers.items()) if "error" in answer]
        for rank in absent:
            workers[rank].process.send_signal(signal.SIGUSR1)
        if absent:
            time.sleep(0.5)  # until the stacks are written
        texts = [answers.get(rank, {}).get("error", "") + one.output() for rank, one in enumerate(workers)]
        self.close()
        told = [f"ranks {failed} failed in {what}"] if failed else []
        told += [f"ranks {absent} did not answer to {what}"] if absent else []
        told += [f"[rank {rank}] {line}" for rank, text in enumerate(texts) for line in text.splitlines()]
        return GangError("\n".join(told))


@dataclass
class Gangs:
    """Gangs by size, one alive at a time: a larger one serves smaller sizes with its first ranks."""

    _alive: Processes | None = None

    def __call__(self, size: int) -> "_Share":
        return _Share(self, size)

    def of(self, size: int) -> Processes:
        """A gang of at least this size."""
        if self._alive is None or self._alive.size < size:
            self.close()
            self._alive = Processes(size)
        return self._alive

    def close(self) -> None:
        """End the ranks."""
        if self._alive:
            self._alive.close()
            self._alive = None


@dataclass
class _Share:
    gangs: Gangs
    size: int

    def run(self, target: str, arguments: dict[str, Any] | None = None, timeout: float = 60.0) -> list[Any]:
        """``Processes.run`` on so many ranks."""
        return self.gangs.of(self.size).run(target, arguments, timeout, self.size)


@dataclass
class _Worker:
    process: subprocess.Popen
    answers: IO[str]
    log: IO[bytes]

    @classmethod
    def start(cls, rank: int, size: int, port: int) -> "_Worker":
        ours, theirs = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``end``
        given = {"rank": rank, "size": size, "port": port, "answers": theirs}
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.gang_worker",
                *(f"--{name}={value}" for name, value in given.items()),
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            text=True,
        )
        os.close(theirs)
        return cls(process, os.fdopen(ours), log)

    def send(self, job: dict[str, Any]) -> None:
        """Hand over a job, with an empty log."""
        self.log.truncate(0)
        self.log.seek(0)  # the process writes at the same offset
        with contextlib.suppress(BrokenPipeError):  # a process that died tells so by its answer
            assert self.process.stdin
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer, which is there; an error where the process died."""
        line = self.answers.readline()
        return json.loads(line) if line else {"error": f"died with status {self.process.wait()}\n"}

    def output(self) -> str:
        """What the process wrote since the last job came."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.answers, self.log):
            with contextlib.suppress(BrokenPipeError):
                if file:
                    file.close()


def _collect(workers: list[_Worker], deadline: float) -> dict[int, dict[str, Any]]:
    """Answers by rank, until all are there, it is late, or a rank has failed and the others had a grace."""
    answers: dict[int, dict[str, Any]] = {}
    with selectors.DefaultSelector() as selector:
        for rank, worker in enumerate(workers):
            selector.register(worker.answers, selectors.EVENT_READ, rank)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                answers[key.data] = workers[key.data].answer()
                selector.unregister(key.fileobj)
                if "error" in answers[key.data]:
                    deadline = min(deadline, time.monotonic() + GRACE)
    return answers


def _ready(comm: object) -> None:
    """The first job of a gang."""
