"""What the tests of native checkpoints share: states, comparisons, faults at file-system calls."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from weft.checkpoint.load import Checkpoint, open_checkpoint
from weft.checkpoint.shard import Piece

# The calls of one save that change the disk or decide about it.
CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")


def values(step: int, count: int = 6, size: int = 500) -> dict[str, Tensor]:
    """The whole state at a step: a function of the step alone."""
    rng = torch.Generator().manual_seed(step)
    state = {f"model/layers.{i}.weight": torch.randn(size, generator=rng) for i in range(count)}
    state["optimizer/exp_avg/norm.weight"] = torch.randn(5, 7, generator=rng, dtype=torch.float64)
    state["model/half"] = torch.randn(33, generator=rng).to(torch.bfloat16)
    state["rng"] = torch.randint(0, 256, (40,), generator=rng, dtype=torch.uint8)
    return state


def pieces(state: dict[str, Tensor]) -> list[Piece]:
    return [Piece.whole(name, tensor) for name, tensor in state.items()]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit."""
    return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)


def check_equal(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    assert sorted(checkpoint.names()) == sorted(state)
    for name, tensor in state.items():
        assert same(checkpoint.read(name), tensor), name


def check_step(path: Path | None) -> int:
    """The step directory loads bit-equal to ``values`` of its step, which is returned."""
    assert path is not None
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    assert checkpoint.meta == {"step": checkpoint.step}
    check_equal(checkpoint, values(checkpoint.step))
    return checkpoint.step


def child(work: Callable[[], None]) -> int:
    """A forked process that does the work and exits 0, or 1 after an error; its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the test
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nothing(*_: object) -> None:
    pass


def at_call(number: int, before: Callable = nothing, after: Callable = nothing) -> SimpleNamespace:
    """Wrap the calls in ``os`` and act around the one with this number (from 1).

    ``before(name, half)`` may call ``half`` to write half of the bytes; ``after(name)`` also follows a
    call that failed. Undo with ``restore``; ``log`` holds the name and path of all ``count`` calls so far.
    """
    state = SimpleNamespace(count=0, log=[])
    real = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable:
        def call(*args, **kwargs):
            state.count += 1
            mine = state.count == number
            named = args[0]
            place = os.readlink(f"/proc/self/fd/{named}") if isinstance(named, int) else os.fspath(named)
            state.log.append((name, Path(place)))
            if mine:
                before(name, lambda: real[name](args[0], args[1][: len(args[1]) // 2]))
            try:
                return real[name](*args, **kwargs)
            finally:
                if mine:
                    after(name)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    state.restore = lambda: [setattr(os, name, function) for name, function in real.items()]
    return state


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
