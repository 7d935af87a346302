"""GPU tests skip where there is no GPU; gangs of processes are shared; each worker has a core."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_configure() -> None:
    """One core for each xdist worker: threads of a gang pass the interpreter's lock on, which takes twice as
    long from core to core."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def processes() -> Iterator[Any]:
    """``processes(4).run("tests.some.module:function", {...})``: a job of four Gloo processes; gangs.py."""
    from tests.gangs import Gangs  # once the annotations of weft are checked

    gangs = Gangs()
    yield gangs
    gangs.close()
