"""The vision encoder against itself: pieces against whole sequences, nothing, recomputation, contents."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.models.presets import CRADIO_V4_H, CRADIO_V4_H_TINY
from weft.models.vision import VisionEncoder
from weft.nn.encoder import PieceAttention
from weft.nn.slots import Halo
from weft.ops.backend import use
from weft.plan.items import Piece, Pieces
from weft.plan.shard import Plane, held, localize
from weft.spec.vision import VisionConfig

CONFIG = replace(
    CRADIO_V4_H_TINY, hidden_size=16, intermediate_size=24, layer_scale=True, final_norm=True, output_size=12
)
SIZES = ((1, 4, 4), (2, 4, 4), (2, 4, 4), (1, 2, 6), (1, 10, 8))


def make(config: VisionConfig = CONFIG, dtype: torch.dtype = torch.float64) -> VisionEncoder:
    """Every parameter random."""
    model = VisionEncoder(config).to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.2 * draw if norm else draw / (p.shape[-1] ** 0.5 if p.dim() > 1 else 3))
    return model


def patches(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    pixels = CONFIG.channels * CONFIG.patch**2
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [draw(rows * cols, frames * pixels).to(dtype) for frames, rows, cols in sizes]


def everything(sizes: Sequence[tuple[int, ...]] = SIZES) -> Pieces:
    return Pieces.all(sizes, [CONFIG.rows(size) for size in sizes])


def cut(data: Sequence[Tensor], pieces: Sequence[Piece]) -> list[Tensor]:
    """Patches of pieces."""
    skip = CONFIG.prefix
    return [data[p.sequence][max(p.start - skip, 0) : max(p.stop - skip, 0)] for p in pieces]


def gradients(model: VisionEncoder) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


class Meeting(Halo):
    """Rows of all ranks, each a thread, through one list."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.rows: list[Tensor] = [torch.empty(0)] * ranks
        self.barrier = threading.Barrier(ranks)

    def forward(self, x: Tensor, pieces: Pieces) -> Tensor:
        self.rows[pieces.own] = x
        self.barrier.wait(30)
        found = {}
        for rank, rows in zip(pieces.ranks, self.rows, strict=True):
            for piece, own in zip(rank, rows.split([p.rows for p in rank]), strict=True):
                found[piece.sequence, piece.start] = own
        self.barrier.wait(30)
        whole = [found[key] for p in pieces.reach(None) for key in sorted(found) if key[0] == p.sequence]
        return torch.cat([x[:0], *whole])


def scattered(ranks: int, seed: int) -> tuple[tuple[Piece, ...], ...]:
    """Every sequence cut at random places; its parts go to ranks at random, at most one to each."""
    rng = np.random.default_rng(seed)
    given: list[list[Piece]] = [[] for _ in range(ranks)]
    for i, size in enumerate(SIZES):
        whole = CONFIG.rows(size)
        parts = int(rng.integers(1, ranks + 1))
        cuts = [0, *sorted(rng.choice(np.arange(1, whole), parts - 1, replace=False).tolist()), whole]
        for (a, b), rank in zip(pairwise(cuts), rng.permutation(ranks), strict=False):
            given[rank].append(Piece(i, a, b, whole))
    return tuple(map(tuple, given))


@pytest.mark.parametrize("seed", range(6))
def test_pieces_on_ranks_equal_the_whole(seed: int) -> None:
    model, data, whole = make(), patches(SIZES), everything()
    want = model(data, model.context(whole))
    cotangent = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(seed))
    want.backward(cotangent)
    wanted = gradients(model)

    ranks = scattered(seed % 3 + 2, seed)
    for module in [m for m in model.modules() if isinstance(m, PieceAttention)]:
        module.halo = Meeting(len(ranks))
    results: list[Tensor] = [torch.empty(0)] * len(ranks)

    def run(own: int) -> None:
        pieces = Pieces(SIZES, ranks, own)
        ctx = model.context(pieces)
        results[own] = model.through(model.first(cut(data, pieces.here), ctx), range(2), ctx)

    threads = [threading.Thread(target=run, args=(own,)) for own in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    at = [
        (p.sequence, p.start, rows)
        for rank, result in zip(ranks, results, strict=True)
        for p, rows in zip(rank, result.split([p.rows for p in rank]), strict=True)
    ]
    rows = torch.cat([rows for _, _, rows in sorted(at, key=lambda item: item[:2])])
    got = model.projector(model.last(rows, model.context(whole)))
    torch.testing.assert_close(got, want.detach(), rtol=1e-11, atol=1e-11)
    got.backward(cotangent)
    close(gradients(model), wanted)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_first_makes_only_the_rows_that_it_is_asked_for(parts: int) -> None:
    """As tensor parallelism asks: consecutive parts of the rows of a bin, cut anywhere."""
    model, data, pieces = make(), patches(SIZES), everything()
    want = model.first(data, model.context(pieces))
    edges = [pieces.rows * i // parts for i in range(parts + 1)]
    got = []
    for start, stop in pairwise(edges):
        ctx = replace(model.context(pieces), rows=slice(start, stop))
        got.append(model.first(cut(data, pieces.part(range(start, stop))), ctx))
        assert len(got[-1]) == stop - start
    torch.testing.assert_close(torch.cat(got), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_nothing_gives_nothing_and_zero_gradients(backend: str) -> None:
    model = make()
    with use(attention=backend, mlp=backend, norm=backend):
        out = model([], model.context(Pieces((), ((),))))
        assert out.shape == (0, CONFIG.output_size)
        out.sum().backward()
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_sequences_do_not_see_each_other() -> None:
    model, data = make(), patches(SIZES)
    together = model(data, model.context(everything()))
    apart = [model([own], model.context(everything((size,)))) for own, size in zip(data, SIZES, strict=True)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-11, atol=1e-11)


def test_recompute_is_the_same_bits() -> None:
    found = []
    for on in (False, True):
        model = make()
        model.set_recompute(on)
        model(patches(SIZES), model.context(everything())).square().sum().backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(gradient.any() for gradient in found[0].values())


def test_bf16() -> None:
    want = make()(patches(SIZES), make().context(everything())).float()
    model = make(dtype=torch.bfloat16)
    got = model(patches(SIZES, torch.float32), model.context(everything()))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() <= 5e-2 * want.norm()


VARIANTS = {
    "published": CRADIO_V4_H,
    "everything": replace(CRADIO_V4_H, layer_scale=True, final_norm=True, projector_bias=True),
    "pictures": replace(CRADIO_V4_H_TINY, frames=0, qkv_bias=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_module_holds_exactly_the_listed_tensors(name: str) -> None:
    config = VARIANTS[name]
    model = VisionEncoder(config)
    held_here = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert held_here == {spec.name: spec.shape for spec in config.params()}
    layers = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    norm = ["norm"] if config.final_norm else []
    assert list(model.units()) == ["embed", *layers, *norm, "projector"]


def test_some_units_and_a_part_of_each() -> None:
    here = {"layers.1", "norm", "projector"}
    plane = Plane(tp=4)
    model = VisionEncoder(CONFIG, lambda config: localize(config, plane, 1), here.__contains__)
    assert list(model.units()) == ["layers.1", "norm", "projector"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    specs = {s.name: s for s in CONFIG.params() if any(s.name.startswith(unit + ".") for unit in here)}
    assert shapes.keys() == specs.keys()
    for name, spec in specs.items():
        boxes = [piece.local for piece in held(spec, plane, 1)]
        assert shapes[name] == tuple(map(max, zip(*(box.stop for box in boxes), strict=True))), name
