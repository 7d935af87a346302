"""Token table and output head with the vocabulary over all ranks of a tensor plane."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.nn.slots import Lookup, Loss
from weft.parallel.moves import Blocks
from weft.plan.shard import Plane

BlocksOf = Callable[[int], Blocks]  # the residual stream of so many tokens


CHUNK = 2048  # tokens whose rows exist before they are summed over ranks


class ShardedLookup(Lookup):
    """Each rank looks up the tokens of its part of the vocabulary; the sum is cut to residual blocks."""

    def __init__(self, vocabulary: range, blocks: BlocksOf) -> None:
        super().__init__()
        self._vocabulary, self._blocks = vocabulary, blocks

    def forward(
        self, ids: Int[Tensor, " tokens"], weight: Float[Tensor, "vocab embed"]
    ) -> Float[Tensor, "rows width"]:
        """This rank's residual block; zeros for a negative id. No rank holds rows of all tokens at a time."""
        own = ids - self._vocabulary.start
        own = own.masked_fill((own < 0) | (own >= len(self._vocabulary)), -1)
        return _Lookup.apply(weight, own, self._blocks(len(ids)))


class _Lookup(torch.autograd.Function):
    """Rows of the table for the same tokens of every rank's block at a time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, own: Tensor, blocks: Blocks) -> Tensor:
        height = max(1, min(blocks.longest, CHUNK // len(blocks.counts)))
        runs = (_split(part, height, blocks.longest) for part in own.split(blocks.counts))
        ctx.chunks = [
            torch.cat([F.pad(part, (0, height - len(part)), value=-1) for part in chunk])
            for chunk in zip(*runs, strict=True)
        ]
        ctx.shape, ctx.move = weight.shape, Blocks(blocks.comm, [height] * len(blocks.counts), blocks.columns)
        count = blocks.counts[blocks.comm.rank // blocks.columns]
        made = weight.new_empty(count, weight.shape[1] // blocks.columns)
        for at, ids in zip(range(0, blocks.longest, height), ctx.chunks, strict=True):
            rows = F.embedding(ids.clamp_min(0), weight).masked_fill_((ids < 0).unsqueeze(1), 0.0)
            to = made[at : at + height]
            to.copy_(ctx.move.scatter(rows)[: len(to)])
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total, height = grad.new_zeros(ctx.shape), ctx.move.longest
        for at, ids in zip(range(0, height * len(ctx.chunks), height), ctx.chunks, strict=True):
            part = grad[at : at + height]
            rows = ctx.move.gather(F.pad(part, (0, 0, 0, height - len(part))))
            total += torch.ops.aten.embedding_dense_backward(rows, ids, len(total), -1, False)
        return total, None, None


def _split(part: Tensor, height: int, longest: int) -> list[Tensor]:
    """Runs of ``height``, as many as the longest part has; the last ones may be short or empty."""
    return [part[at : at + height] for at in range(0, longest, height)]


class ShardedLoss(Loss):
    """Cross-entropy whose logits exist for a chunk of tokens and a part of the vocabulary at a time."""

    def __init__(self, vocabulary: range, blocks: BlocksOf, place: int, plane: Plane) -> None:
        super().__init__()
        self._vocabulary, self._blocks, self._place, self._plane = vocabulary, blocks, place, plane

    def forward(
        self,
        hidden: Float[Tensor, "rows embed"],
        weight: Float[Tensor, "vocab width"],
        targets: Int[Tensor, " tokens"],
        scale: float,
        chunk: int,
    ) -> Float[Tensor, ""]:
        """This rank's part of ``scale`` times the summed loss of targets >= 0."""
        return _Loss.apply(hidden, weight, self._work(targets, chunk), scale, torch.is_grad_enabled())

    @torch.no_grad()
    def best(
        self,
        hidden: Float[Tensor, "rows embed"],
        weight: Float[Tensor, "vocab width"],
        targets: Int[Tensor, " tokens"],
        chunk: int,
    ) -> Int[Tensor, " rows"]:
        """The most likely token after each row of this rank's block."""
        work, parts = self._work(targets, chunk), [targets.new_zeros(0)]
        for at in range(0, work.targets.shape[1], work.height):
            own = hidden[at : at + work.height]
            h = work.move.gather(F.pad(own, (0, 0, 0, work.height - len(own))))
            mine = slice(work.row * work.height, work.row * work.height + len(own))
            parts.append(work.best(h @ weight.t())[mine])
        return torch.cat(parts)

    def _work(self, targets: Tensor, chunk: int) -> "_Work":
        blocks = self._blocks(len(targets))
        height = max(1, min(blocks.longest, chunk // self._plane.tp))
        padded = -(-blocks.longest // height) * height
        parts = [F.pad(part, (0, padded - len(part)), value=-1) for part in targets.split(blocks.counts)]
        counts = [height] * self._plane.tp
        row, column = divmod(self._place, self._plane.tp_embed)
        move = Blocks(blocks.comm, counts, self._plane.tp_embed)
        return _Work(torch.stack(parts), move, self._vocabulary, row, column == 0)


class _Work:
    """The chunks of one loss: the same rows of every rank's block at a time.

    Attributes:
        targets: by row of the plane, filled up with -1 to whole chunks.
        move: the residual blocks of one chunk.
        vocabulary: rows of the head that are here.
        row: this rank's row of the plane.
        counts: whether this rank counts the loss of its row (one rank of each row does).
    """

    def __init__(self, targets: Tensor, move: Blocks, vocabulary: range, row: int, counts: bool) -> None:
        self.targets, self.move, self.vocabulary = targets, move, vocabulary
        self.row, self.counts = row, counts

    @property
    def height(self) -> int:
        """Rows of one rank in one chunk."""
        return self.move.longest

    def best(self, logits: Tensor) -> Tensor:
        """The largest logit's token, over all ranks; the first of equals."""
        tops, at = logits.max(-1)
        everyone, ids = self.move.comm.all_gather(tops), self.move.comm.all_gather(at + self.vocabulary.start)
        return ids.masked_fill(everyone < everyone.amax(0), torch.iinfo(ids.dtype).max).amin(0)

    def softmax(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, the softmax of the logits here (in place), and targets here (-1: not here)."""
        own = targets - self.vocabulary.start
        own = own.masked_fill((own < 0) | (own >= len(self.vocabulary)), -1)
        top = logits.amax(-1)
        at = logits.gather(1, own.clamp_min(0).unsqueeze(1)).squeeze(1).masked_fill(own < 0, 0.0)
        shifted = logits.sub_(top.unsqueeze(1)).exp_()
        tops, sums, ats = self.move.comm.all_gather(torch.stack([top, shifted.sum(-1), at])).unbind(1)
        highest = tops.amax(0)
        whole = (sums * (tops - highest).exp()).sum(0)
        shifted.mul_(((top - highest).exp() / whole).unsqueeze(1))
        return highest + whole.log() - ats.sum(0), shifted, own


class _Loss(torch.autograd.Function):
    """Gradients are formed in the forward pass, chunk by chunk (``weft.ops.cross_entropy``)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, work: _Work, scale: float, training: bool
    ) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if training else None
        grad_weight = torch.zeros_like(wide) if training else None
        loss, height = wide.new_zeros(()), work.height
        for at in range(0, work.targets.shape[1], height):
            own = hidden[at : at + height]
            h = work.move.gather(F.pad(own, (0, 0, 0, height - len(own)))).to(wide.dtype)
            target = work.targets[:, at : at + height].flatten()
            nll, grad, here = work.softmax(h @ wide.t(), target)
            factor = (target >= 0).to(wide.dtype) * scale
            if work.counts:
                mine = slice(work.row * height, (work.row + 1) * height)
                loss += (nll * factor)[mine].sum()
            if grad_hidden is not None and grad_weight is not None:
                inside = (here >= 0).to(grad.dtype).neg().unsqueeze(1)
                grad.scatter_add_(1, here.clamp_min(0).unsqueeze(1), inside)
                grad.mul_(factor.unsqueeze(1))
                grad_weight.addmm_(grad.t(), h)
                grad_hidden[at : at + height] = work.move.scatter(grad @ wide)[: len(own)]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return *grads, None, None, None
