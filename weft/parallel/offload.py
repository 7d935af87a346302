"""What a forward pass keeps for its backward pass, moved to the host and brought back.

Autograd's hooks of saved tensors see what is kept. It is kept by storage, so that views of one tensor move
once; parameters stay where they are. What layers keep beside autograd (gradients that a loss forms in its
forward pass, indices on the host) is not moved.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEAST = 1024  # bytes; smaller tensors stay


def storage(tensor: Tensor) -> int:
    """Which storage a tensor lies in, also while the storage has no memory."""
    return tensor.untyped_storage()._cdata


class _Part(NamedTuple):
    """A saved tensor: a view of something that is held."""

    held: "_Held"
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Held:
    """The bytes of one storage, here or on the host."""

    def __init__(self, tensor: Tensor) -> None:
        whole = tensor.untyped_storage()
        self.device = tensor.device
        self.here: Tensor | None = torch.empty(0, dtype=torch.uint8, device=self.device).set_(whole)
        self.host: Tensor | None = None

    def out(self, stream: torch.cuda.Stream | None) -> None:
        if self.here is None:
            return
        self.host = torch.empty(len(self.here), dtype=torch.uint8, pin_memory=stream is not None)
        self.host.copy_(self.here, non_blocking=stream is not None)
        if stream:
            self.here.record_stream(stream)
        self.here = None

    def back(self, stream: torch.cuda.Stream | None) -> None:
        if self.host is None:
            return
        self.here = torch.empty(len(self.host), dtype=torch.uint8, device=self.device)
        self.here.copy_(self.host, non_blocking=stream is not None)
        self.host = None

    def view(self, part: _Part) -> Tensor:
        if self.here is None:
            raise RuntimeError(
                "a backward pass reads activations that are on the host: IN must come before B"
            )
        if self.device.type == "cuda":
            self.here.record_stream(torch.cuda.current_stream())
        empty = torch.empty(0, dtype=part.dtype, device=self.device)
        return empty.set_(self.here.untyped_storage(), part.offset, part.size, part.stride)


class Kept:
    """What one pass keeps.

    Args:
        stays: storages that are not moved: parameters.
        beside: on CUDA, the stream of copies.
    """

    def __init__(self, stays: frozenset[int], beside: torch.cuda.Stream | None = None) -> None:
        self._stays, self._stream = stays, beside
        self._held: dict[int, _Held] = {}
        self._moving: Any = None

    def hooks(self) -> AbstractContextManager[Any]:
        """Around the forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Part:
        key = storage(tensor)
        if key in self._stays or tensor.untyped_storage().nbytes() < LEAST:
            return tensor.detach()  # a leaf that is read by the pass may lose its data meanwhile
        if key not in self._held:
            self._held[key] = _Held(tensor)
        held = self._held[key]
        return _Part(held, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Part) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if self._moving is not None:
            self._moving.wait()
        return saved.held.view(saved)

    @property
    def bytes(self) -> int:
        """On the device, of what can be moved."""
        return sum(len(held.here) for held in self._held.values() if held.here is not None)

    def out(self) -> None:
        """Move everything to the host; on CUDA beside what is computed."""
        with self._beside():
            for held in self._held.values():
                held.out(self._stream)

    def back(self) -> None:
        """Bring it back; on CUDA beside what is computed."""
        with self._beside():
            for held in self._held.values():
                held.back(self._stream)
            self._moving = self._stream.record_event() if self._stream else None

    def _beside(self) -> AbstractContextManager[Any]:
        """The stream of copies, after what is queued now."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)
