"""Runs of tokens of documents that other ranks share: the mathematics of ``weft.parallel.scan`` on one rank.

The scan is linear in its state: tokens are scanned from zero wherever they are, and the states after such
runs follow from one another by their decays.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.nn.slots import Conv, split_channels
from weft.ops.conv import causal_conv
from weft.ops.scan import across, ssd
from weft.ops.segments import Segments


class Left(NamedTuple):
    """What ranks leave behind, a row of each."""

    logs: Tensor  # of the decay through the last document
    states: Tensor  # after it
    newest: Tensor  # inputs, zeros before the first of them
    first: Tensor  # inputs, of the tokens left apart, and zeros after them
    steps: Tensor  # of these tokens

    def of(self, rank: int, count: int) -> "Left":
        """Of so many ranks up to this one."""
        return Left(*(t[rank + 1 - count : rank + 1] for t in self))


class Run(NamedTuple):
    """The inputs of ``ssd``."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def rows(self, tokens: slice) -> "Run":
        """The same of some of the tokens."""
        return self._replace(x=self.x[tokens], dt=self.dt[tokens], B=self.B[tokens], C=self.C[tokens])

    def scan(self, segments: Segments, chunk: int, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and final states."""
        return cast(tuple[Tensor, Tensor], ssd(*self, segments, chunk, initial, return_final=True))

    def decay(self, tokens: slice) -> Tensor:
        """The logarithm of the decay through some tokens, per head, in the dtype of states."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        return self.dt[tokens].to(wide).sum(0) * self.A.to(wide)

    def add(self, y: Tensor, tokens: int, state: Tensor) -> list[Tensor]:
        """``y`` with what ``state`` gives to the first ``tokens``: these, and the others."""
        given = across(self.dt[:tokens], self.A, self.C[:tokens], state)
        return [(y[:tokens] + given).to(y.dtype), y[tokens:]]


class Chain(NamedTuple):
    """Runs of the tokens of a document: what one rank scanned, what the next one left apart, and so on."""

    run: Run  # all that were left apart
    y: Tensor  # their outputs, from zero
    logs: Tensor  # of the decay through each run
    states: Tensor  # after each, from zero
    inputs: Tensor  # before the tokens of each rank, and after the last: [ranks + 1, channels, tail]


class Mixer(NamedTuple):
    """The parameters of a convolution, if there is one, and a scan."""

    conv: Conv | None
    A: Tensor
    D: Tensor
    sizes: tuple[int, int]

    @property
    def tail(self) -> int:
        """Inputs that the convolution reaches back."""
        return self.conv.weight.shape[1] - 1 if self.conv else 0

    def run(self, xBC: Tensor, dt: Tensor, segments: Segments, before: Tensor | None = None) -> Run:
        """What the scan reads, after the convolution."""
        if self.conv:
            xBC = cast(Tensor, causal_conv(xBC, *self.conv, segments, initial=before))
        x, B, C = split_channels(xBC, len(self.A), self.sizes)
        return Run(x, dt, self.A, B, C, self.D)

    def chain(self, left: Left, parts: Sequence[int], given: Tensor | None, chunk: int) -> Chain:
        """The runs of a document of so many tokens on some ranks, of what these left behind.

        What later ranks left apart is scanned here; its padding has time step 0 and changes no state.
        """
        tail, inputs = left.first.shape[1], _before(left.newest, parts, given)
        each = Segments((tail,) * (len(parts) - 1))
        flat = left.first[1:].flatten(0, 1), left.steps[1:].flatten(0, 1)
        run = self.run(*flat, each, inputs[1:-1])
        y, after = run.scan(each, chunk)
        steps = left.steps[1:].to(after.dtype).sum(1) * self.A.to(after.dtype)
        logs, states = _mixed(left.logs, steps), _mixed(left.states, after)
        return Chain(run, y, logs, states, inputs)


def carry(logs: Tensor, states: Tensor) -> Tensor:
    """The state after runs of tokens from the states ``[runs, ...]`` after each alone, and their decays."""
    later = F.pad(logs[1:].flip(0).cumsum(0).flip(0), (0, 0, 0, 1))  # decay through all runs after each
    return torch.einsum("rh,rhpn->hpn", later.exp(), states)


def _mixed(ours: Tensor, between: Tensor) -> Tensor:
    """Rows in turn: ours, one from between, ours, and so on to the last of ours."""
    return torch.cat([ours[:1], torch.stack([between, ours[1:]], dim=1).flatten(0, 1)])


def _before(newest: Tensor, parts: Sequence[int], given: Tensor | None) -> Tensor:
    """The inputs before each part of a document and after the last, ``[parts + 1, channels, tail]``.

    Args:
        newest: ``[parts, tail, channels]``, the last inputs of each part, zeros before the first of them.
        parts: tokens of each; a short one does not hold all that the next one needs.
        given: ``[channels, tail]``, the inputs before the document; zeros without it.
    """
    tail = newest.shape[1]
    held = [min(tail, part) for part in parts]
    own = [rows[tail - count :] for rows, count in zip(newest, held, strict=True)]
    line = torch.cat([torch.zeros_like(newest[0]) if given is None else given.t().to(newest.dtype), *own])
    starts = accumulate(held, initial=0)
    return torch.stack([line[start : start + tail] for start in starts]).transpose(1, 2)
