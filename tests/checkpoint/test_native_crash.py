"""Checkpoints under SIGKILL, full disks and lost ranks: a committed step always loads, bit for bit."""

import ctypes
import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import at_call, check_step, child, die, ended, pieces, values

from weft.checkpoint import steps
from weft.checkpoint.save import AsyncSaver, save
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError, RunError
from weft.parallel.c10d import C10dComm
from weft.parallel.comm import SingleComm
from weft.parallel.threads import run_threads

ONE = SingleComm()


def save_step(root: Path, step: int, keep: int = 0) -> Path:
    return save(root, step, pieces(values(step)), {"step": step}, ONE, keep)


def save_for_ever(root: Path, pipe: int, background: bool) -> None:
    """Save step after step; tell each committed one."""
    step = steps.number(steps.latest(root))
    saver = AsyncSaver()
    os.write(pipe, b"0\n")
    while True:
        step += 1
        state = pieces(values(step))
        if background:
            saver.save(root, step, state, {"step": step}, ONE, keep=2)
            saver.wait()
        else:
            save(root, step, state, {"step": step}, ONE, keep=2)
        os.write(pipe, f"{step}\n".encode())


def test_sigkill_at_50_random_times(tmp_path):
    rng = random.Random(7)
    save_step(tmp_path, 1)
    torn = 0
    for trial in range(50):
        reader, writer = os.pipe()
        pid = child(lambda: save_for_ever(tmp_path, writer, background=trial % 2 == 1))  # noqa: B023
        os.close(writer)
        told = os.read(reader, 2)  # it runs
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        with os.fdopen(reader, "rb") as rest:
            returned = max(int(line) for line in (told + rest.read()).split(b"\n")[:-1])
        assert check_step(steps.latest(tmp_path)) >= returned  # what a save returned for is never lost
        for path in steps.committed(tmp_path):
            check_step(path)
        torn += bool(steps.torn(tmp_path))
    assert torn >= 10  # the kills did land inside saves
    last = steps.number(steps.latest(tmp_path))
    save_step(tmp_path, last + 1)
    assert steps.torn(tmp_path) == []


@pytest.mark.parametrize("moment", ["after", "inside"])
def test_sigkill_at_each_file_system_call_of_one_save(tmp_path, moment, caplog):
    root, first, number, ends = tmp_path / "checkpoints", tmp_path / "first", 0, []
    save_step(first, 1)

    def inside(name: str, half: Callable) -> None:
        if name == "write":
            half()
        die()

    while not ends or ends[-1] != 0:
        number += 1
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(first, root)
        (root / "step_0000000.saving").mkdir()
        (root / "step_0000000.saving" / "rank_00000_000.safetensors").write_bytes(b"torn")

        def work(number=number) -> None:
            at_call(number, **({"before": inside} if moment == "inside" else {"after": die}))
            save_step(root, 2, keep=1)

        ends.append(ended(child(work)))
        found = check_step(steps.latest(root))
        assert found == 2 or ends[-1] != 0
        left = set(steps.torn(root))
        with caplog.at_level("WARNING"):
            caplog.clear()
            save_step(root, 3)
        assert steps.torn(root) == []
        assert all(any(str(path) in line for line in caplog.messages) for path in left)  # reported
    assert set(ends[:-1]) == {-signal.SIGKILL}
    assert number > 30  # open, write, fsync and close of shard and manifest, directories, sweep, prune


def test_order_on_the_medium(tmp_path):
    """Data before the manifest's directory, that before the name, the name before the return and before
    an old step goes: what a power failure leaves is what SIGKILL leaves."""
    save_step(tmp_path, 1)
    hook = at_call(0)
    try:
        save_step(tmp_path, 2, keep=1)
    finally:
        hook.restore()
    log = hook.log
    draft = tmp_path / "step_0000002.saving"
    commit = log.index(("rename", draft))
    written = {path for name, path in log if name == "write"}
    assert written == {draft / "rank_00000_000.safetensors", draft / "manifest.json"}
    for path in written:
        last = max(i for i, entry in enumerate(log) if entry == ("write", path))
        assert last < log.index(("fsync", path)) < log.index(("fsync", draft)) < commit
    durable = next(i for i in range(commit, len(log)) if log[i] == ("fsync", tmp_path))
    retire = log.index(("rename", tmp_path / "step_0000001"))
    retired = next(i for i in range(retire, len(log)) if log[i] == ("fsync", tmp_path))
    removed = min(i for i, (name, _) in enumerate(log) if name == "unlink")
    assert commit < durable < retire < retired < removed


def test_an_error_at_each_file_system_call_of_one_save(tmp_path):
    """A full disk at any call: no partial directory, the step before intact, one clear message."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    first, number, done, errors = tmp_path / "first", 0, False, []
    save_step(first, 1)
    while not done:
        number += 1
        root = shutil.copytree(first, tmp_path / str(number))
        hook = at_call(number, after=full)
        try:
            save_step(root, 2)
        except RunError as error:
            errors.append(str(error))
        finally:
            hook.restore()
        done = hook.count < number
        check_step(root / "step_0000001")
        check_step(steps.latest(root))
        assert steps.torn(root) == []
        assert save_step(root, 2) == steps.latest(root)
    assert len(errors) >= 15
    said = re.compile(
        r"no space \(No space left on device\): need [\d.]+ kB, have .* at .*/\d+; free some, .*"
    )
    assert [error for error in errors if not said.fullmatch(error)] == []


def test_preflight_and_full_disk_on_a_real_file_system(tmp_path, monkeypatch):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("mounting a small file system needs root; the other tests here need nothing")
    try:
        save_step(tmp_path, 1)
        big = [Piece.whole("big", torch.zeros(400_000))]
        free = shutil.disk_usage(tmp_path).free
        with pytest.raises(RunError, match=r"no space: need 1\.6 MB, have 1\.\d+ MB at .*; free some"):
            save(tmp_path, 2, big, {}, ONE)
        monkeypatch.setattr("weft.checkpoint.disk.check_space", lambda *_: None)
        with pytest.raises(RunError, match=r"no space \(No space left on device\): need 1\.6 MB, have "):
            save(tmp_path, 2, big, {}, ONE)
        saver = AsyncSaver()
        saver.save(tmp_path, 2, big, {}, ONE)
        with pytest.raises(RunError, match="no space"):
            saver.wait()
        assert check_step(steps.latest(tmp_path)) == 1
        assert steps.torn(tmp_path) == []
        assert shutil.disk_usage(tmp_path).free == free
        save_step(tmp_path, 2)
    finally:
        libc.umount2(os.fsencode(tmp_path), 2)


def test_file_size_limit_without_root(tmp_path):
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(RunError, match=r"no space \(File too large\): need "):
            save_step(tmp_path, 2)

    save_step(tmp_path, 1)
    assert ended(child(work)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]
    check_step(steps.latest(tmp_path))


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "checkpoints").write_text("not a directory")
    with pytest.raises(RunError, match=r"cannot save at .*checkpoints.*; check run\.dir"):
        save_step(tmp_path / "checkpoints", 1)


def test_error_on_one_rank_is_raised_on_all(tmp_path, monkeypatch):
    """Rank 1's disk fills up: both ranks raise the same, nothing is left, the next save works."""
    real = os.write

    def write(fd: int, data: memoryview) -> int:
        if "rank_00001" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    def work(comm):
        mine = [Piece(f"rank{comm.rank}", torch.ones(3), (3,), (0,))]
        try:
            save(tmp_path, 1, mine, {}, comm)
        except RunError as error:
            return str(error)

    monkeypatch.setattr(os, "write", write)
    told = run_threads(2, work)
    assert told[0] == told[1]
    assert told[0].startswith("rank 1: no space")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert run_threads(2, work) == [None, None]


def gloo_rank(rank: int, store: Path, root: Path, number: int) -> None:
    """One of two processes; rank 1 dies after its call ``number``."""
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(str(store), 2))
    state = [piece for i, piece in enumerate(pieces(values(2))) if i % 2 == rank]
    if rank == 1 and number:
        at_call(number, after=die)
    save(root, 2, state, {"step": 2}, C10dComm())


@pytest.mark.parametrize("number", [0, 1, 3, 5])
def test_gloo_ranks_and_the_death_of_one(tmp_path, number):
    """Two processes commit together; if one dies in its write, the other fails and leaves nothing."""
    root = tmp_path / "checkpoints"
    save_step(root, 1)
    store = tmp_path / "store"
    pids = [child(lambda: gloo_rank(rank, store, root, number)) for rank in range(2)]  # noqa: B023
    ends = [ended(pid) for pid in pids]
    assert ends == ([1, -signal.SIGKILL] if number else [0, 0])
    assert check_step(steps.latest(root)) == (1 if number else 2)
    assert steps.torn(root) == []


def test_two_processes_do_not_save_into_one_directory(tmp_path):
    told, tell = os.pipe()
    wait, go = os.pipe()

    def work() -> None:
        os.close(go)  # so that the read ends when the test does, whatever happens
        at_call(4, before=lambda *_: (os.write(tell, b"x"), os.read(wait, 1)))
        save_step(tmp_path, 2)

    save_step(tmp_path, 1)
    pid = child(work)
    try:
        os.read(told, 1)  # the other process is inside its save
        held = steps.torn(tmp_path)
        with pytest.raises(CheckpointError, match="another process is saving into"):
            save_step(tmp_path, 3)
        assert steps.torn(tmp_path) == held == [tmp_path / "step_0000002.saving"]  # it is not swept
    finally:
        os.close(go)
        end = ended(pid)
        for fd in (told, tell, wait):
            os.close(fd)
    assert end == 0
    assert check_step(steps.latest(tmp_path)) == 2
