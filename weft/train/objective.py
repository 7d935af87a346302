"""What training minimizes: next token, MTP depths, router balance, as SUMs over the global batch.

    loss = sum CE_0 / N_0 + (scale / D) * sum_k (sum CE_k / N_k) + (balance + z) / tokens

N_k is the number of targets of depth k in the whole global batch, known before the forward pass,
so microbatches and ranks only ever add (docs/design.md, law 2).
"""

from collections.abc import Iterable, Mapping, Sequence
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
from weft.plan.boundary import Table
from weft.plan.items import Item, Placed
from weft.plan.runs import Run as Rows
from weft.plan.stages import Piece
from weft.spec.count import mean_context
from weft.spec.encoder import EncoderConfig
from weft.train.team import Team

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


@dataclass(frozen=True)
class Taken:
    """What a rank reads in a step.

    Attributes:
        batches: its microbatches; none where it has nothing of the decoder.
        totals: counts of the global batch.
        tables: lengths of every microbatch, of all readers, where someone needs them; else empty.
    """

    batches: list[Batch]
    totals: Totals
    tables: list[Table]


def take(batches: Iterable[Batch], vocab: int, team: Team, learns: bool = True) -> Taken:
    """Read this rank's microbatches of a step, check them, count those of all ranks; a collective call.

    Of ranks that read the same microbatches, one counts them. ``learns``: there must be a target.

    Raises:
        DataError: on every rank, naming rank and samples: ``batches`` failed or was empty, a token id is
            not below ``vocab``, or every label of the global batch is masked.
    """
    mesh = team.decoder.mesh if team.decoder else None
    counts = mesh is not None and mesh.leads
    several = bool(team.plans.decoder.of_stages) or len(team.plans.all) > 1
    taken: list[Batch] = []

    def read() -> list[Batch]:
        try:
            taken.extend(batches)
        except WeftError:
            raise
        except Exception as error:
            raise DataError(f"reading the data failed: {error!r}") from error
        if not taken and mesh is not None:
            raise DataError("the data has ended before the last step; lower train.train_iters")
        for batch in taken:
            check_tokens(batch, vocab)
            check_items(batch, team.modules.encoders)
        return taken

    def told() -> tuple[Any, ...]:
        read()
        reader = mesh.reader if mesh and several and counts else -1
        return *_counts(taken, counts), reader, [_told(batch) for batch in taken] if reader >= 0 else []

    everyone = on_every(team.comm, told)
    readers = {reader: parts for *_, reader, parts in everyone if reader >= 0}
    tables = [_table(parts) for parts in zip(*(readers[i] for i in sorted(readers)), strict=True)]
    return Taken(taken, _count([each[:3] for each in everyone], taken, team.comm, learns), tables)


def _told(batch: Batch) -> tuple[Any, ...]:
    """What other ranks need to know of a microbatch."""
    return batch.windows, [(*placed.item, placed.places) for placed in batch.items]


def _table(parts: Sequence[Sequence[Any]]) -> Table:
    """A microbatch of all readers, from what each told; JSON has made lists of tuples."""
    sizes: list[int] = []
    items: list[Placed] = []
    for windows, told in parts:
        before = sum(sizes)
        sizes += windows
        for encoder, shapes, rows, ref, places in told:
            item = Item(encoder, tuple(map(tuple, shapes)), rows, tuple(ref))
            items.append(Placed(item, tuple(Rows(before + start, length) for start, length in places)))
    return Table(tuple(sizes), tuple(items))


def check_items(batch: Batch, encoders: Mapping[str, EncoderConfig]) -> None:
    """Refuse items that no encoder reads, or that do not fill their places.

    Raises:
        DataError: naming the samples, and both numbers.
    """
    for item, places in batch.items:
        if item.encoder not in encoders:
            known = ", ".join(encoders) or "none"
            fix = f"the run's encoders are: {known}; add one under encoders, or leave such samples out"
            raise DataError(f"samples {list(batch.samples)} hold something for {item.encoder!r}; {fix}")
        filled = sum(run.length for run in places)
        if filled != item.rows:
            raise DataError(
                f"an item of samples {list(batch.samples)} has {item.rows} rows for {filled} placeholder "
                f"tokens ({item.ref}); make them equal"
            )


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


def _count(
    everyone: Sequence[Sequence[Any]], mine: Sequence[Batch], comm: Comm, learns: bool = True
) -> Totals:
    targets, tokens, keys = zip(*everyone, strict=True)
    depths = tuple(sum(depth) for depth in zip(*(own for own in targets if own), strict=True))
    totals = Totals(depths, sum(tokens), sum(keys) / max(1, sum(tokens)))
    if learns and totals.targets[0] == 0:
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
        tokens: token ids, -1 where an encoder's row comes.
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
    ids = batch.tokens.copy() if batch.items else batch.tokens
    for placed in batch.items:  # rows of an encoder come there
        for run in placed.places:
            ids[run.start : run.stop] = -1
    numbers = [np.arange(n) + (sample << 32) for sample, n in zip(batch.samples, batch.windows, strict=True)]
    places = np.concatenate([np.zeros(0, np.int64), *numbers])
    arrays = (ids[here], batch.future[:, here], batch.mask[:, here], places[here])
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
    """One stage's share of ``objective``; ``x`` is the residual stream before its layers (None: embed)."""
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
