"""Joining the ranks that torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from weft.config.env import local_rank, world_size
from weft.parallel.c10d import C10dComm
from weft.parallel.comm import Comm, SingleComm


@contextmanager
def connected(device: torch.device, timeout: float = 1800.0) -> Iterator[Comm]:
    """The communicator of this process: all of torchrun's ranks, or one rank without torchrun.

    Args:
        device: CUDA tensors travel by NCCL, host values by Gloo.
        timeout: seconds a collective may take.
    """
    if world_size() == 1:
        yield SingleComm()
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield C10dComm(timeout=timeout)
    finally:
        dist.destroy_process_group()
