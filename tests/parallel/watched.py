"""Three ranks in a loop of compute and collectives; at step STEP something goes wrong, as arguments say."""

import argparse
import os
import signal
import time

import torch
import torch.distributed as dist

from weft.parallel.watchdog import Watchdog

STEP = 5
FOREVER = 600.0


def say(line: str) -> None:
    """In one piece, for three processes share the pipe."""
    os.write(1, f"{line}\n".encode())


def fault(kind: str, rank: int, victim: int) -> None:
    """What goes wrong before the collective of step ``STEP``."""
    if kind == "late":
        time.sleep(0.4 * rank)
    elif kind == "error" and rank == victim:
        raise ValueError("no luck")
    elif kind == "orphan" and rank == victim:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(FOREVER)
    elif (kind == "compute" and rank == victim) or (kind == "collective" and rank == (victim + 1) % 3):
        time.sleep(FOREVER)  # under "collective" the victim waits there for its neighbour


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("victim", type=int)
    parser.add_argument("--silence", type=float, default=4.0)
    parser.add_argument("--stall", type=float, default=0.0)
    asked = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with Watchdog(rank, dist.get_world_size(), asked.silence, asked.stall) as watchdog:
        say(f"rank {rank} is {os.getpid()}")
        for step in range(1, STEP + 1):
            watchdog.beat(step, "compute")
            if step == STEP:
                if asked.kind == "collective" and rank == asked.victim:
                    watchdog.beat(step, "collective")
                say(f"rank {rank} is there")
                fault(asked.kind, rank, asked.victim)
            watchdog.beat(step, "collective")
            if asked.kind != "late" or step < STEP:
                dist.all_reduce(torch.ones(8))
    say(f"rank {rank} is done")


if __name__ == "__main__":
    main()
