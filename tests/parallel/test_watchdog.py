"""A rank that is killed, stopped or stuck ends the run under torchrun, within its time and with its name."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.parallel.watched import STEP
from weft.parallel.pulse import Beat, kill, start_time

SCRIPT = Path(__file__).with_name("watched.py")
LIMIT = 30.0  # seconds from the fault to the end of torchrun
TOLD = 0.5  # seconds after which the others know where a rank stands


class Launch:
    """``torchrun`` of three ranks of ``watched.py``, and what they said so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.text, self.pids = process, "", {}

    def wait_for(self, word: str) -> None:
        """Read until all ranks have said ``word``; notes their processes."""
        while len(re.findall(rf"^rank \d {word}", self.text, re.MULTILINE)) < 3:
            line = self.process.stdout.readline()
            assert line, self.text
            self.text += line
        self.pids = {int(rank): int(pid) for rank, pid in re.findall(r"^rank (\d) is (\d+)", self.text, re.M)}

    def end(self) -> float:
        """Seconds until torchrun ends; none of its ranks is left then."""
        began = time.monotonic()
        self.text += self.process.communicate(timeout=2 * LIMIT)[0]
        took = time.monotonic() - began
        assert not any(start_time(pid) for pid in self.pids.values()), self.text
        return took


@contextmanager
def launched(*arguments: str) -> Iterator[Launch]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    with subprocess.Popen(
        [*command, str(SCRIPT), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        launch = Launch(process)
        try:
            yield launch
        finally:
            process.kill()
            for pid in launch.pids.values():
                if start_time(pid):
                    os.kill(pid, signal.SIGKILL)


CASES = [
    (victim, sign, phase)
    for victim in (0, 1)
    for sign in (signal.SIGKILL, signal.SIGSTOP)
    for phase in ("compute", "collective")
]
FAST = [(0, signal.SIGSTOP, "collective"), (1, signal.SIGKILL, "compute")]


@pytest.mark.parametrize(
    ("victim", "sign", "phase"),
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES],
)
def test_a_lost_rank_ends_torchrun_with_its_name_and_step(victim: int, sign: int, phase: str) -> None:
    with launched(phase, str(victim)) as launch:
        launch.wait_for("is there")
        time.sleep(TOLD)
        os.kill(launch.pids[victim], sign)
        assert launch.end() < LIMIT
        assert launch.process.returncode != 0
        lost = rf"rank {victim} \(process {launch.pids[victim]} on .*at step {STEP} in {phase}; stopping"
        for rank in {0, 1, 2} - {victim}:
            assert re.search(rf"^weft: rank {rank} at step {STEP} in .*: {lost}", launch.text, re.M), (
                launch.text
            )


@pytest.mark.slow
def test_ranks_that_finish_at_their_own_times_raise_no_alarm() -> None:
    with launched("late", "0") as launch:
        launch.wait_for("is done")
        launch.end()
        assert launch.process.returncode == 0
        assert "weft:" not in launch.text


@pytest.mark.slow
def test_an_error_on_one_rank_is_what_the_others_report() -> None:
    with launched("error", "1") as launch:
        launch.wait_for("is there")
        assert launch.end() < LIMIT
        assert "[rank1]: ValueError: no luck" in launch.text
        reported = rf"RunError: rank 1 .* stopped at step {STEP} in compute: ValueError: no luck"
        for rank in (0, 2):
            assert re.search(rf"^\[rank{rank}\]: .*{reported}", launch.text, re.M), launch.text


@pytest.mark.slow
def test_ranks_that_beat_but_do_not_move_print_their_stacks() -> None:
    with launched("compute", "1", "--stall=3") as launch:
        launch.wait_for("is there")
        assert launch.end() < LIMIT
        where = f"rank 1 at step {STEP} in compute"
        assert f"no rank has moved for 3 s: ranks 0, 2 at step {STEP} in collective; {where}" in launch.text
        for rank, place in ((0, "dist.all_reduce"), (1, "time.sleep"), (2, "dist.all_reduce")):
            assert re.search(rf"^weft: rank {rank} +{place}", launch.text, re.M), launch.text


@pytest.mark.slow
def test_ranks_end_without_torchrun() -> None:
    with launched("orphan", "2") as launch:
        launch.wait_for("is there")
        launch.process.wait(LIMIT)
        until = time.monotonic() + LIMIT
        while any(start_time(pid) for pid in launch.pids.values()):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert launch.process.stdout.read().count(f"torchrun (process {launch.process.pid}") == 3


@pytest.mark.slow
def test_sigterm_ends_ranks_that_wait_in_a_collective() -> None:
    with launched("collective", "0") as launch:
        launch.wait_for("is there")
        time.sleep(TOLD)
        launch.process.terminate()
        assert launch.end() < 10
        assert f"weft: rank 0 at step {STEP} in collective: SIGTERM; stopping" in launch.text


def test_only_the_process_that_spoke_is_killed() -> None:
    """A process number that the kernel has given to another process is left alone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        beat = replace(Beat.own(1), pid=process.pid, started=start_time(process.pid))
        for other in (replace(beat, started=beat.started + 1), replace(beat, place="elsewhere")):
            kill(other)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.3)
        kill(beat)
        assert process.wait(10) == -signal.SIGKILL
