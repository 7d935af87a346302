"""What training minimizes: next token, MTP depths, router balance, as SUMs over the global batch.

    loss = sum CE_0 / N_0 + (scale / D) * sum_k (sum CE_k / N_k) + (balance + z) / tokens

N_k is the number of targets of depth k in the whole global batch, known before the forward pass,
so microbatches and ranks only ever add (docs/design.md, law 2).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from weft.config.errors import DataError, WeftError
from weft.data.batch import Batch
from weft.models.hybrid import HybridLM, Losses
from weft.ops.segments import Segments
from weft.parallel.comm import Comm
from weft.parallel.mesh import Mesh
from weft.parallel.together import on_every
from weft.plan.stages import Piece
from weft.spec.count import mean_context

CPU = torch.device("cpu")
PARTS = ("lm_loss", "mtp_loss", "aux_loss", "z_loss")


@dataclass(frozen=True)
class Totals:
    """Counts of the global batch.

    Attributes:
        targets: targets per depth, the next token first.
        tokens: all tokens.
        context: mean keys seen by a token, itself included.
    """

    targets: tuple[int, ...]
    tokens: int
    context: float


def take(
    batches: Iterable[Batch], vocab: int, comm: Comm, mesh: Mesh | None = None
) -> tuple[list[Batch], Totals, list[list[int]]]:
    """Read this rank's microbatches of a step, check them, count those of all ranks; a collective call.

    Of ranks that read the same microbatches, one counts them.

    Returns:
        This rank's microbatches; counts of the global batch; and, where pipeline ranks differ in layout, the
        tokens of every sample of each microbatch, of all readers.

    Raises:
        DataError: on every rank, naming rank and samples: ``batches`` failed or was empty, a token id is
            not below ``vocab``, or every label of the global batch is masked.
    """
    taken: list[Batch] = []

    def read() -> list[Batch]:
        try:
            taken.extend(batches)
        except WeftError:
            raise
        except Exception as error:
            raise DataError(f"reading the data failed: {error!r}") from error
        if not taken:
            raise DataError("the data has ended before the last step; lower train.train_iters")
        for batch in taken:
            check_tokens(batch, vocab)
        return taken

    counts = mesh is None or mesh.leads
    several = mesh is not None and bool(mesh.whole.of_stages)

    def told() -> tuple[Any, ...]:
        sizes = [batch.windows for batch in read()] if several and counts else []
        return *_counts(taken or read(), counts), sizes

    everyone = on_every(comm, told)
    readers = [sizes for *_, sizes in everyone if sizes]  # in the order of the samples
    sizes = [[size for own in parts for size in own] for parts in zip(*readers, strict=True)]
    return taken, _count([each[:3] for each in everyone], taken, comm), sizes


def count(batches: Sequence[Batch], comm: Comm) -> Totals:
    """Counts over all microbatches and ranks.

    Raises:
        DataError: no target is left in the global batch (every label is masked).
    """
    return _count(on_every(comm, lambda: _counts(batches)), batches, comm)


def _counts(batches: Sequence[Batch], counts: bool = True) -> tuple[list[int], int, float]:
    """Targets per depth, tokens, and the keys that all tokens together see; zeros where they do not count."""
    targets = [counts * sum(depth) for depth in zip(*(batch.targets for batch in batches), strict=True)]
    lengths = tuple(n for batch in batches for n in batch.lengths if n) if counts else ()
    return targets, sum(lengths), sum(lengths) * mean_context(lengths) if lengths else 0.0


def _count(everyone: Sequence[Sequence[Any]], mine: Sequence[Batch], comm: Comm) -> Totals:
    targets, tokens, keys = zip(*everyone, strict=True)
    depths = tuple(sum(depth) for depth in zip(*targets, strict=True))
    totals = Totals(depths, sum(tokens), sum(keys) / sum(tokens))
    if totals.targets[0] == 0:
        raise DataError(
            f"all {totals.tokens} labels of the global batch are masked ({who_read(mine, comm)}): nothing to "
            "learn from; check the loss mask of the data"
        )
    return totals


def who_read(batches: Sequence[Batch], comm: Comm, mine: bool = True) -> str:
    """The samples of the ranks that say ``mine``, or of all ranks if none does; a collective call."""
    samples = [sample for batch in batches for sample in batch.samples]
    everyone = list(enumerate(comm.gather_objects((mine, samples))))
    chosen = [(rank, samples) for rank, (named, samples) in everyone if named]
    chosen = chosen or [(rank, samples) for rank, (_, samples) in everyone]
    return "; ".join(f"rank {rank} read samples {samples}" for rank, samples in chosen)


def check_tokens(batch: Batch, vocab: int) -> None:
    """Refuse token ids that the model's vocabulary does not have.

    Raises:
        DataError: naming the id and the samples.
    """
    if not len(batch.tokens):
        return
    largest, least = max(int(batch.tokens.max()), int(batch.future.max())), int(batch.tokens.min())
    if largest >= vocab or least < 0:
        wrong = largest if largest >= vocab else least
        raise DataError(
            f"token id {wrong} (samples {list(batch.samples)}) is outside the model's vocabulary of {vocab}; "
            "use the tokenizer of this model or raise model.vocab_size"
        )


@dataclass(frozen=True)
class Run:
    """This rank's part of the tokens of a microbatch, on the device.

    Attributes:
        tokens: token ids.
        future: see ``Batch``.
        mask: which targets count.
        segments: documents.
        places: number of each token in the whole training run (``Context.places``).
    """

    tokens: Int[Tensor, " tokens"]
    future: Int[Tensor, "targets tokens"]
    mask: Bool[Tensor, "targets tokens"]
    segments: Segments
    places: Int[Tensor, " tokens"]


def to_device(batch: Batch, device: torch.device = CPU, mesh: Mesh | None = None) -> Run:
    """The part of a microbatch that is here: all of it without a mesh."""
    segments = Segments(batch.lengths, batch.windows)
    if mesh and mesh.layout.grid.size("cp") > 1:
        segments = segments.part(mesh.layout.tokens(segments.tokens), mesh.part)
    here = slice(segments.start, segments.start + segments.tokens)
    numbers = [np.arange(n) + (sample << 32) for sample, n in zip(batch.samples, batch.windows, strict=True)]
    places = np.concatenate([np.zeros(0, np.int64), *numbers])
    arrays = (batch.tokens[here], batch.future[:, here], batch.mask[:, here], places[here])
    tokens, future, mask, where = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
    return Run(tokens, future, mask, segments, where)


@dataclass(frozen=True)
class Outcome:
    """What one stage makes of a microbatch.

    Attributes:
        x: the residual stream after it; None where the model ends.
        loss: this stage's part of the loss; None where nothing here has one.
        parts: its PARTS, detached.
        reported: what the model reports; sums of cross-entropy are zero where the model does not end.
    """

    x: Tensor | None
    loss: Tensor | None
    parts: Tensor
    reported: Losses


def whole(model: HybridLM) -> Piece:
    """All of a model as one stage."""
    return Piece(range(len(model.config.blocks)), first=True, last=True, table=True)


def stage_objective(
    model: HybridLM, piece: Piece, x: Tensor | None, run: Run, totals: Totals, chunk: int, **known: Any
) -> Outcome:
    """One stage's share of ``objective``; ``x`` is the residual stream before it (None before the table)."""
    ctx = model.context(run.segments, places=run.places, **known)
    x = model.through(model.embed(run.tokens) if x is None else x, piece.layers, ctx)
    if piece.last:
        scales = [1.0 / max(1, n) for n in totals.targets]
        losses = model.end(x, run.future, run.mask, ctx, scales, chunk)
        mtp = sum(losses.mtp, start=losses.lm.new_zeros(())) / max(1, len(losses.mtp))
    else:
        mtp = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        losses = Losses(mtp, (), ctx.stats, ctx.replay.choices)
    stats = losses.stats.values()
    zero = losses.lm.new_zeros(())
    balance = sum((s.balance for s in stats), start=zero) / totals.tokens
    z = sum((s.z for s in stats), start=zero) / totals.tokens
    loss = losses.lm + model.config.mtp_loss_scale * mtp + balance + z
    parts = torch.stack([losses.lm.detach(), mtp.detach(), balance.detach(), z.detach()])
    return Outcome(None if piece.last else x, loss if loss.requires_grad else None, parts, losses)


def objective(
    model: HybridLM, run: Run, totals: Totals, chunk: int, **known: Any
) -> tuple[Tensor, Tensor, Losses]:
    """One microbatch's share of the loss, its PARTS (detached), and everything the model reports.

    ``known``: further fields of the forward pass's context.
    """
    made = stage_objective(model, whole(model), None, run, totals, chunk, **known)
    assert made.loss is not None  # noqa: S101 - the head's
    return made.loss, made.parts, made.reported
