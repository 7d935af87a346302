"""The sound encoder: pieces on simulated ranks equal the whole; passes without rows; recomputation."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from weft.models.audio import AudioEncoder
from weft.models.presets import PARAKEET_OMNI_TINY
from weft.nn.audio import Conformer, ConvModule, RelativeAttention, RunningNorm
from weft.nn.context import Context
from weft.nn.slots import Halo
from weft.ops.segments import Segments
from weft.plan.items import Piece, Pieces
from weft.plan.shard import Plane, localize
from weft.plan.shard import held as held_boxes
from weft.spec.audio import AudioConfig

CLIPS = (17, 41, 90, 1, 64)  # frames: 17, 41 and 1 end with a row that hears nothing


def make(config: AudioConfig, seed: int = 0) -> AudioEncoder:
    """With every parameter and buffer drawn."""
    model = AudioEncoder(config).to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            flat = tensor.dim() == 1 and not name.endswith("bias")
            tensor.copy_(1 + 0.3 * draw if flat else draw / tensor[0].numel() ** 0.5)
            if name.endswith("var"):
                tensor.copy_(draw.square() + 0.5)
    return model


def clips(config: AudioConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(n, config.mels, generator=generator, dtype=torch.float64) for n in CLIPS]
    return [torch.cat([x[:-1], torch.zeros_like(x[:1])]) for x in found]


def context(pieces: Pieces, rows: slice = slice(None)) -> Context:
    return Context(Segments(pieces.lengths), pieces=pieces, rows=rows)


def data(config: AudioConfig, pieces: Pieces, part: range | None = None) -> list[Tensor]:
    """The frames that each piece needs."""
    found, sound = [], clips(config)
    for piece in pieces.part(part if part is not None else range(pieces.rows)):
        first, last = config.frames(piece.start, piece.stop, pieces.sizes[piece.sequence])
        found.append(sound[piece.sequence][first:last])
    return found


def everything(config: AudioConfig) -> Pieces:
    sizes = [(n,) for n in CLIPS]
    return Pieces.all(sizes, [config.rows(size) for size in sizes])


class Wide(Halo):
    """Where pieces of all ranks are computed at once: what each has with the rows around it."""

    def forward(self, x: Tensor, pieces: Pieces) -> Tensor:
        table = {
            (p.sequence, p.start + i): row
            for p, own in zip(pieces.here, x.split(pieces.lengths), strict=True)
            for i, row in enumerate(own)
        }
        reached = pieces.reach(self.rows)
        return torch.stack([table[p.sequence, r] for p in reached for r in range(p.start, p.stop)])


class Rest(Halo):
    """Where no row is here: zeros for those of others."""

    def forward(self, x: Tensor, pieces: Pieces) -> Tensor:
        return torch.cat([x, x.new_zeros(sum(p.rows for p in pieces.reach(self.rows)), *x.shape[1:])])


def put(model: AudioEncoder, halo: type[Halo]) -> None:
    for layer in model.layers.values():
        for branch in (layer.attention, layer.conv):
            assert isinstance(branch, RelativeAttention | ConvModule)
            branch.halo = halo(branch.halo.rows)


@pytest.mark.parametrize("norm", ["batch", "rms"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pieces_equal_whole(norm: str, ranks: int) -> None:
    """Rows of all clips dealt in runs to several ranks; every layer sees others' rows through Halo only."""
    config = replace(PARAKEET_OMNI_TINY, conv_norm=norm)
    model, whole = make(config), everything(config)
    wanted = model(data(config, whole), context(whole))
    factor = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=wanted.dtype)
    expected = torch.autograd.grad((wanted * factor).sum(), list(model.parameters()))

    cuts = [whole.rows * i // (ranks * 3) for i in range(ranks * 3 + 1)]
    runs = [whole.part(range(a, b)) for a, b in pairwise(cuts)]
    dealt = tuple(piece for rank in range(ranks) for run in runs[rank::ranks] for piece in run)
    flat = Pieces(whole.sizes, (dealt,))
    put(model, Wide)
    found = model(data(config, flat), context(flat))
    first = dict(zip(range(len(CLIPS)), Segments(whole.lengths).starts, strict=True))
    index = torch.tensor([first[p.sequence] + row for p in dealt for row in range(p.start, p.stop)])
    torch.testing.assert_close(found, wanted[index], rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad((found * factor[index]).sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_first_makes_its_own_rows_only() -> None:
    config = PARAKEET_OMNI_TINY
    model, whole = make(config), everything(config)
    wanted = model.first(data(config, whole), context(whole))
    parts = [range(whole.rows)[rows] for rows in (slice(0, 5), slice(5, 6), slice(6, None), slice(0, 0))]
    found = [
        model.first(data(config, whole, part), context(whole, slice(part.start, part.stop))) for part in parts
    ]
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-12, atol=1e-12)


def test_clips_do_not_see_each_other() -> None:
    config = PARAKEET_OMNI_TINY
    model, whole = make(config), everything(config)
    together = model(data(config, whole), context(whole)).split(whole.lengths)
    for i, (size, sound) in enumerate(zip(whole.sizes, clips(config), strict=True)):
        alone = Pieces.all([size], [config.rows(size)])
        y = model([sound[: config.frames(0, config.rows(size), size)[1]]], context(alone))
        torch.testing.assert_close(y, together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("here", [(), (Piece(0, 2, 2, 3),)])
def test_a_pass_without_rows(here: tuple[Piece, ...]) -> None:
    config = PARAKEET_OMNI_TINY
    model = make(config)
    pieces = Pieces(((20,),), (here, (Piece(0, 0, 3, 3),)))
    put(model, Rest)
    y = model([], context(pieces))
    assert y.shape == (0, config.output_size)
    grads = torch.autograd.grad(y.sum(), list(model.parameters()), materialize_grads=True)
    assert all(not grad.any() for grad in grads)


def test_recomputation_changes_nothing() -> None:
    config = PARAKEET_OMNI_TINY
    model, whole = make(config), everything(config)
    results = []
    for on in (False, True):
        model.set_recompute(on)
        y = model(data(config, whole), context(whole))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_units_and_wrong_frames() -> None:
    config = PARAKEET_OMNI_TINY
    model = AudioEncoder(config)
    assert list(model.units()) == ["embed", "layers.0", "layers.1", "projector"]
    named = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name: tuple(t.shape) for name, t in named.items()} == {s.name: s.shape for s in config.params()}
    part = AudioEncoder(config, has=lambda unit: unit == "layers.1")
    assert list(part.units()) == ["layers.1"]
    whole = everything(config)
    with pytest.raises(ValueError, match="rows 0 to 3 need frames 0 to 16 of 17, but 17 were given"):
        make(config).first([torch.zeros(17, config.mels)] * len(CLIPS), context(whole))


@pytest.mark.parametrize("norm", ["batch", "rms"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_layout_cuts_every_layer(norm: str, tp: int) -> None:
    config = replace(PARAKEET_OMNI_TINY, conv_norm=norm, attention_bias=True)
    plane = Plane(tp=tp)
    for place in range(tp):
        here = AudioEncoder(config, local=partial(localize, plane=plane, place=place))
        named = dict([*here.named_parameters(), *here.named_buffers()])
        for spec in config.params():
            held = sum(box.local.numel for box in held_boxes(spec, plane, place))
            assert named[spec.name].numel() == held, spec.name
            inner = spec.name.startswith("layers") and "norm_" not in spec.name
            back = spec.name.endswith(("o_proj.bias", "down_proj.bias"))
            assert held == spec.numel // (tp if inner and not back else 1)


def test_low_precision_is_close() -> None:
    config = PARAKEET_OMNI_TINY
    exact, low, whole = make(config), make(config).bfloat16(), everything(config)
    for layer in low.layers.values():
        assert isinstance(layer, Conformer)
        norm = layer.conv.norm
        assert isinstance(norm, RunningNorm)
        norm.mean, norm.var = norm.mean.float(), norm.var.float()
    a, b = (model(data(config, whole), context(whole)) for model in (exact, low))
    assert b.dtype == torch.bfloat16
    assert (a - b).norm() < 0.05 * a.norm()
    b.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
