"""Blocks of rows that stay in a CPU's caches while several operations pass over them."""

from collections.abc import Iterator

import torch


def block_rows(device: torch.device, width: int, numbers: int) -> int:
    """Rows of ``width`` numbers that make a block of about ``numbers``; only CPUs need blocks."""
    return max(1, numbers // max(1, width)) if device.type == "cpu" else 2**62


def blocks(rows: int, step: int) -> Iterator[slice]:
    """Slices of at most ``step`` that cover ``rows``, as even as possible."""
    parts = -(-rows // step)
    return (slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts))
