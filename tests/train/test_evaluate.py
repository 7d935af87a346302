"""Evaluation and bits per byte against every token's loss, computed one document part at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import CONFIG, make
from weft.build.model import assemble
from weft.data.stream import Split, Stream, make_split
from weft.models.hybrid import HybridLM
from weft.ops.backend import use
from weft.ops.segments import Segments
from weft.parallel.comm import Comm, SingleComm
from weft.parallel.mesh import mesh_of
from weft.parallel.store import Store
from weft.parallel.threads import run_threads
from weft.spec.layout import ExpertsConfig, LayoutConfig, PlanConfig, StoreConfig
from weft.train.evaluate import Evaluation, evaluate
from weft.train.team import decoder_only

START, LENGTHS, BYTES = 1, (9, 3, 20, 1, 14), 133
OPS = ("attention", "conv", "cross_entropy", "experts", "mlp", "norm", "router", "scan")


def tiny_split() -> Split:
    data = np.random.default_rng(3).integers(2, 61, sum(LENGTHS))
    bounds = np.cumsum([0, *LENGTHS]).tolist()
    return make_split("valid", [Stream("s", "k", data, bounds, START, bytes=BYTES)])


def direct(model: HybridLM, split: Split, seq_length: int) -> float:
    """Nats over all stored tokens; a part reads the token before each of its targets and nothing else."""
    stream, nats = split.streams[0], 0.0
    cuts = set(range(0, stream.tokens, seq_length)) | set(stream.bounds)
    edges = sorted(cuts)
    with torch.no_grad(), use(**dict.fromkeys(OPS, "reference")):
        for first, last in zip(edges, edges[1:], strict=False):
            targets = torch.from_numpy(stream.data[first:last])
            before = START if first in stream.bounds else int(stream.data[first - 1])
            reads = torch.cat([torch.tensor([before]), targets[:-1]])
            logp = model.logits(reads, Segments((last - first,))).log_softmax(-1)
            nats -= logp.gather(1, targets[:, None]).sum().item()
    return nats


@pytest.mark.parametrize("seq_length", [7, 16, 1000])
def test_bits_per_byte_of_every_token(seq_length: int) -> None:
    split, model = tiny_split(), make("fp64")
    nats = direct(model, split, seq_length)
    result = evaluate(
        decoder_only(model, mesh_of(PlanConfig(), SingleComm())), split.windows(seq_length, 2, 2), chunk=5
    )
    assert result.tokens == split.tokens == sum(LENGTHS)
    assert result.loss == pytest.approx(nats / sum(LENGTHS), rel=1e-12)
    bits = result.bits_per_byte(split.tokens, split.bytes)
    assert bits == pytest.approx(nats / math.log(2) / BYTES, rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_two_ranks_read_the_same_tokens(count: int) -> None:
    split = tiny_split()
    alone = direct(make("fp64"), split, 7)

    def share(comm: Comm) -> Evaluation:
        windows = split.windows(7, 2, count, part=comm.rank, parts=comm.size)
        return evaluate(decoder_only(make("fp64"), mesh_of(PlanConfig(), comm)), windows, chunk=5)

    for result in run_threads(2, share):
        assert result.tokens == sum(LENGTHS)
        assert result.loss == pytest.approx(alone / sum(LENGTHS), rel=1e-12)


def test_a_rank_without_windows_adds_nothing() -> None:
    split = tiny_split()

    def share(comm: Comm) -> Evaluation:
        return evaluate(
            decoder_only(make("fp64"), mesh_of(PlanConfig(), comm)),
            split.windows(1000, 2, 2, part=comm.rank, parts=2),
            chunk=5,
        )

    first, second = run_threads(2, share)
    assert first == second
    assert first.tokens == sum(LENGTHS)


LAYOUTS = {
    "tensor": LayoutConfig(tp=2, dp=2),
    "three-dimensional": LayoutConfig(tp=2, tp_embed=2),
    "parameters cut, some readers without windows": LayoutConfig(dp=4, store=StoreConfig(level=3)),
    "stages": LayoutConfig(pp=2, dp=2),
    "many stages": LayoutConfig(pp=4, store=StoreConfig(level=3)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("count", [1, 2])
def test_layouts_read_the_same_tokens(layout: LayoutConfig, count: int) -> None:
    split = tiny_split()
    config = replace(CONFIG, initializer_range=0.1)
    alone = direct(assemble(config, "fp64", torch.device("cpu"), 3), split, 16)

    def share(comm: Comm) -> Evaluation:
        mesh = mesh_of(PlanConfig(decoder=layout), comm, config)
        model = assemble(config, "fp64", torch.device("cpu"), 3, mesh)
        Store(model, config.params(), "fp64", mesh)
        windows = split.windows(16, 2, count, part=mesh.reader, parts=mesh.layout.readers)
        return evaluate(decoder_only(model, mesh), windows, chunk=5)

    for result in run_threads(4, share):
        assert result.tokens == sum(LENGTHS)
        assert result.loss == pytest.approx(alone / sum(LENGTHS), rel=1e-12)


def test_stages_of_different_layouts_read_the_same_tokens() -> None:
    """Two readers on one pipeline rank, four on the other."""
    split, config = tiny_split(), replace(CONFIG, initializer_range=0.1, pattern="M-E*", mtp_num_depths=0)
    alone = direct(assemble(config, "fp64", torch.device("cpu"), 3), split, 16)

    def share(comm: Comm) -> Evaluation:
        mesh = mesh_of(PlanConfig(decoder=LayoutConfig(pp=2, tp_of_stages=(2, 1))), comm, config)
        model = assemble(config, "fp64", torch.device("cpu"), 3, mesh)
        windows = split.windows(16, 0, 3, part=mesh.reader, parts=mesh.layout.readers)
        return evaluate(decoder_only(model, mesh), windows, chunk=5)

    for result in run_threads(8, share):
        assert result.tokens == sum(LENGTHS)
        assert result.loss == pytest.approx(alone / sum(LENGTHS), rel=1e-12)


@pytest.mark.parametrize("decoder", [LayoutConfig(dp=4), LayoutConfig(cp=2, dp=2)], ids=["dp", "cp"])
@pytest.mark.parametrize("padded", [False, True])
def test_experts_of_other_ranks_read_the_same_tokens(decoder: LayoutConfig, padded: bool) -> None:
    """Readers have different numbers of windows, some none, while their experts serve one another."""
    split = tiny_split()
    room = {"moe_capacity_factor": 8.0, "moe_pad_to_capacity": padded}  # nothing is dropped
    config = replace(CONFIG, initializer_range=0.1, **room)
    alone = direct(assemble(config, "fp64", torch.device("cpu"), 3), split, 16)

    def share(comm: Comm) -> Evaluation:
        mesh = mesh_of(PlanConfig(decoder=decoder, experts=ExpertsConfig(ep=4)), comm)
        model = assemble(config, "fp64", torch.device("cpu"), 3, mesh)
        windows = split.windows(16, 2, 2, part=mesh.reader, parts=mesh.layout.readers)
        return evaluate(decoder_only(model, mesh), windows, chunk=5)

    for result in run_threads(4, share):
        assert result.tokens == sum(LENGTHS)
        assert result.loss == pytest.approx(alone / sum(LENGTHS), rel=1e-12)


def test_bits_of_an_estimate() -> None:
    """Two bits a token over a tenth of the split; 40 tokens are 20 bytes."""
    part = Evaluation(loss=2 * math.log(2), tokens=4)
    assert part.bits_per_byte(40, 20) == pytest.approx(4.0, rel=1e-15)
    assert part.bits_per_byte(40, 0) is None
