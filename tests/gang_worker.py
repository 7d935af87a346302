"""One rank of a gang of processes: reads jobs as JSON lines on stdin, answers on a pipe; see gangs.py."""

import argparse
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from weft.parallel.c10d import C10dComm


def main() -> None:
    options = argparse.ArgumentParser()
    for name in ("rank", "size", "port", "answers"):
        options.add_argument(f"--{name}", type=int, required=True)
    given = options.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    limit = timedelta(minutes=10)  # the gang kills us long before
    store = dist.TCPStore("127.0.0.1", given.port, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=given.rank, world_size=given.size, timeout=limit)
    # No type checks of every call here, for time: threads of the test process run the same code with them.
    with os.fdopen(given.answers, "w") as answers:
        world = C10dComm()
        for line in sys.stdin:
            job = json.loads(line)
            answers.write(json.dumps(answer(world.group(range(job["size"])), job)) + "\n")
            answers.flush()


def answer(comm: object, job: dict) -> dict:
    module, _, function = job["target"].partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            work = getattr(importlib.import_module(module), function)
            value = work(comm, **job["arguments"])
            json.dumps(value)
            return {"value": value}
    except BaseException:  # noqa: BLE001 - told to the gang
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main()
    os._exit(0)  # peers may be gone: nothing of Gloo is worth an orderly end
