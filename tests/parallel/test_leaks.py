"""Faults of other systems with packed documents and ranks, each by the number under which it was reported.

Documents must not hear of each other: forward, what one document's tokens are changes no bit of any other's
states; backward, the gradient of one's states is zero, exactly, at all others.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from weft.build.model import assemble
from weft.data.batch import Batch
from weft.data.stream import Stream
from weft.ops.attention import attend
from weft.ops.conv import causal_conv
from weft.ops.cross_entropy import linear_cross_entropy
from weft.ops.dispatch import collect, sort, spread
from weft.ops.experts import expert_mlp
from weft.ops.scan import ssd
from weft.ops.segments import Segments
from weft.parallel.comm import Comm
from weft.parallel.ledger import LedgerComm
from weft.parallel.mesh import mesh_of
from weft.parallel.threads import run_threads
from weft.plan.context import ATTEND_FORMS, SCAN_FORMS
from weft.spec.hybrid import HybridConfig
from weft.spec.layout import LayoutConfig, PlanConfig
from weft.train.objective import to_device

CPU = torch.device("cpu")
MODEL = replace(tiny.CONFIG, pattern="M*-E/*E", mtp_num_depths=2, moe_shared_expert_intermediate_size=24)
# Documents, and tokens of each of four ranks.
PACKS = {
    "at_a_cut_and_over_three_ranks": ((6, 13, 5), (6, 6, 6, 6)),
    "inside_a_rank_and_shorter_than_the_convolution": ((5, 2, 1, 5, 11), (6, 6, 6, 6)),
    "over_a_rank_without_tokens": ((5, 13, 6), (9, 0, 1, 14)),
}


def bounds(lengths: tuple[int, ...]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


def rows_of(lengths: tuple[int, ...], parity: int) -> np.ndarray:
    """Which tokens are of every other document."""
    return np.repeat(np.arange(len(lengths)), lengths) % 2 == parity


def changed(batch: Batch, rows: np.ndarray) -> Batch:
    """Other tokens in some documents."""
    tokens, future = batch.tokens.copy(), batch.future.copy()
    tokens[rows] = (tokens[rows] + 17) % 61
    future[:, rows] = np.where(future >= 0, (future + 17) % 61, -1)[:, rows]
    return replace(batch, tokens=tokens, future=future)


class Model:
    """A model on the part of a pack that one of four ranks has, or on all of it."""

    def __init__(
        self, config: HybridConfig, comm: Comm | None, counts: tuple[int, ...], **forms: Any
    ) -> None:
        mesh = mesh_of(PlanConfig(decoder=LayoutConfig(cp=4, **forms)), comm) if comm else None
        self.model = assemble(config, "fp64", CPU, 1, mesh)
        self.comm, self.counts = comm, counts

    def part(self, batch: Batch) -> tuple[Segments, slice]:
        """The documents and the tokens that are here."""
        segments = Segments(batch.lengths)
        if self.comm:
            segments = segments.part(self.counts, self.comm.rank)
        return segments, slice(segments.start, segments.start + segments.tokens)

    def states(self, batch: Batch) -> Tensor:
        """States of the tokens here, those of the MTP depths beside them."""
        segments, here = self.part(batch)
        tokens, future = torch.from_numpy(batch.tokens[here]), torch.from_numpy(batch.future[:, here])
        ctx = self.model.context(segments)
        hidden = self.model.hidden(tokens, ctx)
        return torch.cat([hidden, *self.model.ahead(hidden, future, ctx)], 1)

    def gradients(self, batch: Batch, rows: np.ndarray) -> Tensor:
        """What the states of some documents say to what was looked up of every token here."""
        looked_up: list[Tensor] = []
        handle = self.model.embed.register_forward_hook(lambda _m, _i, out: looked_up.append(out))
        states = self.states(batch)
        handle.remove()
        own = torch.from_numpy(rows[self.part(batch)[1]])
        return torch.cat(torch.autograd.grad(states, looked_up, states * own.unsqueeze(1)), 1)


def everywhere(ranks: bool, work: Callable[[Comm | None], list[Tensor]]) -> list[Tensor]:
    """What four ranks, or one, compute: each tensor whole."""
    return [torch.cat(parts) for parts in zip(*run_threads(4, work), strict=True)] if ranks else work(None)


def assert_apart(config: HybridConfig, ranks: bool, names: Iterable[str] = PACKS, **forms: Any) -> None:
    """No document of these packs hears of its neighbours, and each is what it is alone."""
    packs = {name: tiny.batch(PACKS[name][0], depths=config.depths) for name in names}

    def work(comm: Comm | None) -> list[Tensor]:
        model, found = Model(config, comm, (), **forms), []
        for name, batch in packs.items():
            model.counts = PACKS[name][1]
            found.append(model.states(batch).detach())
            for rows in (rows_of(batch.lengths, parity) for parity in (0, 1)):
                found += [model.states(changed(batch, rows)).detach(), model.gradients(batch, rows)]
        return found

    found, alone = iter(everywhere(ranks, work)), Model(config, None, ())
    for name, batch in packs.items():
        states = next(found)
        for parity in (0, 1):
            rows, other, gradient = rows_of(batch.lengths, parity), next(found), next(found)
            assert torch.equal(other[~rows], states[~rows]), f"{name}: states of other documents"
            assert not (other[rows] == states[rows]).all(1).any()
            assert not gradient[~rows].any(), f"{name}: gradients of other documents"
        single = torch.cat([alone.states(one).detach() for one in tiny.split(batch)])
        torch.testing.assert_close(states, single, rtol=0, atol=1e-12, msg=name)


def plain(pattern: str) -> HybridConfig:
    return replace(MODEL, pattern=pattern, mtp_num_depths=0)


@pytest.mark.parametrize("form", [*SCAN_FORMS, None])
def test_nemo_rl_4167_mamba_state_and_convolution_leak_between_packed_documents(form):
    """Also Bridge #3474, SkyRL #2056, prime-rl #3000: the scan's state and the convolution's tail bleed."""
    assert_apart(plain("M"), form is not None, **({"scan": form} if form else {}))


@pytest.mark.parametrize("form", [*ATTEND_FORMS, None])
def test_transformers_attention_leaks_between_packed_documents(form):
    """posttrain.md 3.3: 0.57 of a logit between documents where only positions tell them apart."""
    assert_apart(plain("*"), form is not None, **({"attend": form} if form else {}))


@pytest.mark.parametrize("forms", [("ring", "states"), None], ids=str)
def test_megatron_4495_mtp_rolls_over_document_and_rank_boundaries(forms):
    """States of MTP depths too: what a depth looks ahead to never is another document's token."""
    given = dict(zip(("attend", "scan"), forms, strict=True)) if forms else {}
    assert_apart(replace(MODEL, pattern="M/*"), forms is not None, list(PACKS)[1:2], **given)


def ahead(lengths: tuple[int, ...], tokens: np.ndarray, depths: int) -> np.ndarray:
    """Targets, one by one."""
    rows = [[-1] * len(tokens) for _ in range(depths)]
    for document in bounds(lengths):
        for k in range(depths):
            for i in range(document.start, document.stop - k - 1):
                rows[k][i] = int(tokens[i + k + 1])
    return np.array(rows)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_megatron_4495_targets_are_cut_as_tokens_are(cp):
    """Whole documents as the loader reads them: the last target of a rank is the first token of the next."""
    rng = np.random.default_rng(0)
    sizes = [3, 1, 9, 2, 12]  # each document's tokens end with 0; the model reads 1 before the first
    data = np.concatenate([np.append(rng.integers(2, 61, n - 1), 0) for n in sizes])
    stream = Stream("s", "k", data, [0, *accumulate(sizes)], start_token=1)
    batch = stream.window(0, sum(sizes), 2)
    mesh_at = [mesh_of(PlanConfig(decoder=LayoutConfig(cp=cp)), LedgerComm(rank, cp)) for rank in range(cp)]
    runs = [to_device(batch, CPU, mesh) for mesh in mesh_at]
    future = torch.cat([run.future for run in runs], 1).numpy()
    read = np.concatenate([np.append(1, data[d][:-1]) for d in bounds(tuple(sizes))])
    known = ahead(tuple(sizes), read, 3)
    assert (future[known >= 0] == known[known >= 0]).all()
    ends = [d.stop - 1 for d in bounds(tuple(sizes))]
    assert (future[0, ends] == 0).all(), "the end of a document is predicted, and by it alone"
    assert (future[1:, ends] == -1).all()
    assert torch.equal(torch.cat([run.mask for run in runs], 1), torch.from_numpy(future >= 0))


def test_megatron_4495_mtp_losses_of_packed_documents_are_those_of_each():
    packs = {name: tiny.batch(lengths) for name, (lengths, _) in PACKS.items()}
    config = replace(MODEL, pattern="M/*")

    def losses(model: Model, one: Batch) -> Tensor:
        segments, here = model.part(one)
        arrays = (torch.from_numpy(a) for a in (one.tokens[here], one.future[:, here], one.mask[:, here]))
        found = model.model.losses(*arrays, model.model.context(segments), [1.0] * 3, 4)
        return torch.stack([found.lm, *found.mtp]).detach()

    def work(comm: Comm) -> dict[str, Tensor]:
        model, found = Model(config, comm, ()), {}
        for name, batch in packs.items():
            model.counts = PACKS[name][1]
            found[name] = losses(model, batch)
        return found

    ranks, alone = run_threads(4, work), Model(config, None, ())
    for name, batch in packs.items():
        each = sum(losses(alone, one) for one in tiny.split(batch))
        torch.testing.assert_close(sum(rank[name] for rank in ranks), each, rtol=1e-12, atol=1e-12, msg=name)


LONG, META = 2**17 + 3, torch.device("meta")  # tokens; 2^15 numbers of each are more than 2^31


def vast(*shape: int) -> Tensor:
    """Shapes alone, with gradient."""
    return torch.empty(shape, device=META, requires_grad=True)


def operations() -> dict[str, Callable[[], Tensor]]:
    """Each on more than 2^31 numbers, with documents whose boundaries lie anywhere."""
    segments = Segments((61_000, 1, 70_000, LONG - 131_001))
    order, back, counts, _ = sort(torch.empty(LONG, 4, dtype=torch.int64, device=META), 8, LONG // 2)
    pairs = torch.empty(LONG, dtype=torch.int64, device=META)
    return {
        "scan": lambda: ssd(
            vast(LONG, 512, 64),
            vast(LONG, 512),
            vast(512),
            vast(LONG, 1, 8),
            vast(LONG, 1, 8),
            vast(512),
            segments,
            2048,
        ),
        "conv": lambda: causal_conv(vast(LONG, 2**15), vast(2**15, 4), vast(2**15), segments),
        "attention": lambda: attend(
            vast(LONG, 128, 256), vast(LONG, 2, 256), vast(LONG, 2, 256), segments, 1.0
        ),
        "cross_entropy": lambda: linear_cross_entropy(vast(LONG, 2**15), vast(64, 2**15), pairs, 2**14, 1.0),
        "dispatch": lambda: collect(spread(vast(LONG, 2**13), order, back, False), order, back, False),
        "experts": lambda: expert_mlp(
            vast(sum(counts), 2**13), vast(8, 16, 2**13), vast(8, 2**13, 16), counts, vast(sum(counts))
        ),
    }


@pytest.mark.parametrize("name", ["scan", "conv", "attention", "cross_entropy", "dispatch", "experts"])
def test_mamba_1015_offsets_overflow_beyond_61k_tokens_shapes(name):
    """Forward and backward of more than 2^31 numbers: every size that the host reckons with is exact."""
    y = operations()[name]()
    y.sum().backward()
    assert name == "cross_entropy" or y.numel() > 2**30


def test_mamba_1015_offsets_overflow_beyond_61k_tokens_of_rows():
    """Rows and tokens that the host counts go beyond 2^31 too."""
    whole = Segments((2**31 - 5, 11, 2**32))
    part = whole.part((2**31, 2**32, 6), 1)
    assert (part.start, part.lengths, part.continues) == (2**31, (6, 2**32 - 6), True)
