"""Decoder and encoders together against transformers' ``nemotron_h_omni``: logits and every gradient.

transformers computes norms, routers, scans and softmax in fp32 whatever the model is; in the fp64 tests its
modules take fp64 for fp32, so that nothing but the mathematics is compared. The sinusoids of sound stay as
they are: both compute them in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.randomize import randomize as randomize_decoder
from weft.infer.compare import as_transformers_runs
from weft.models.audio import AudioEncoder
from weft.models.hf_omni import LIVE, tensor_links, write_config
from weft.models.hybrid import HybridLM
from weft.models.presets import NEMOTRON3_NANO_OMNI_TINY
from weft.models.vision import VisionEncoder, choose
from weft.nn.context import Context
from weft.ops.segments import Segments
from weft.plan.items import Pieces
from weft.spec.modules import Modules
from weft.spec.vision import kept

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}
ROUNDED = {torch.float64: 1e-9, torch.float32: 5e-5}  # gradients, which go through the depth twice
FILES = ("nemotron_h", "nemotron_h_omni", "radio")


def modules(**changes: Any) -> Modules:
    """The tiny preset, with scales in the layers of vision, as transformers always has them."""
    tiny = NEMOTRON3_NANO_OMNI_TINY
    vision, audio = tiny.encoders.values()
    vision = replace(vision, layer_scale=True, layer_norm_eps=1e-3, **changes)
    return Modules(as_transformers_runs(tiny.decoder), {"vision": vision, "audio": audio})


class Wide:
    """torch, with fp64 under the name of fp32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if request.param == torch.float64:
        parakeet = import_module("transformers.models.parakeet.modeling_parakeet")
        waves, narrow = parakeet.ParakeetEncoderRelPositionalEncoding, Tensor.float
        forward = waves.forward

        def in_fp32(self: Any, x: Tensor) -> Tensor:  # as ours are
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tensor, "float", narrow)
                return forward(self, x)

        monkeypatch.setattr(waves, "forward", in_fp32)
        monkeypatch.setattr(Tensor, "float", Tensor.double)
        for name in FILES:
            file = import_module(f"transformers.models.{name}.modeling_{name}")
            monkeypatch.setattr(file, "torch", Wide())
    yield request.param
    torch.set_num_threads(threads)


@torch.no_grad()
def randomize(theirs: Any, seed: int) -> None:
    """Every parameter, and the statistics of norms, at scales at which all of them matter."""
    randomize_decoder(theirs.language_model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.startswith("language_model.") or not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.copy_(normal.square() + 0.3)
        elif name.endswith(("position_embedding", "cls_register_token")):
            tensor.copy_(normal)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(0.3 * normal)
        elif isinstance(tensor, nn.Parameter):
            flat = 1.2 * normal / tensor[0].numel() ** 0.5
            tensor.copy_(flat if tensor.dim() > 1 else 1 + 0.3 * normal)


def gather(made: Modules, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from theirs (values or gradients); what they lack is NaN."""
    dtype = next(iter(live.values())).dtype
    found = {spec.name: torch.full(spec.shape, torch.nan, dtype=dtype) for spec in made.params()}
    for link in tensor_links(made, LIVE):
        if link.theirs in live:
            box = tuple(slice(a, a + n) for a, n in zip(link.start, link.size, strict=True))
            found[link.ours][box] = live[link.theirs].view(link.size)
    return found


class Omni(nn.Module):
    """Ours: a decoder and its encoders."""

    def __init__(self, made: Modules) -> None:
        super().__init__()
        with torch.device("meta"):
            vision, audio = made.encoders.values()
            self.decoder = HybridLM(made.decoder)
            self.vision, self.audio = VisionEncoder(vision), AudioEncoder(audio)
        self.made = made
        self.to_empty(device="cpu")

    def forward(self, ids: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """Logits; rows of encoders take the places of their placeholders."""
        places = {name: (ids == one.token).nonzero().flatten() for name, one in self.made.encoders.items()}
        lm = self.decoder
        x = lm.embed(ids.index_fill(0, torch.cat([*places.values()]), -1))
        for name, values in rows.items():
            x = x.index_copy(0, places[name], values)
        ctx = Context(Segments((len(ids),)))
        return lm.head.logits(lm.norm(lm.through(x, range(len(lm.layers)), ctx)))


def pair(made: Modules, seed: int, dtype: torch.dtype) -> tuple[Any, Omni]:
    """Both, with the same random values."""
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

    theirs = NemotronH_Omni_Reasoning_V3(NemotronH_Omni_Reasoning_V3_Config(**write_config(made))).eval()
    theirs = theirs.to(dtype)
    theirs.set_experts_implementation("eager")  # grouped products know no fp64
    randomize(theirs, seed)
    theirs.vision_model.config.dtype = dtype
    ours = Omni(made).to(dtype)
    live = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    values = gather(made, {name: tensor.detach() for name, tensor in live.items()})
    ours.load_state_dict({own(made, name): tensor for name, tensor in values.items()})
    return theirs, ours


def own(made: Modules, name: str) -> str:
    """The name of a parameter in ``Omni``."""
    return name if name.partition(".")[0] in made.encoders else f"decoder.{name}"


@dataclass
class Prompt:
    """A prompt, and what encoders read for it, in the order of the placeholders.

    Attributes:
        ids: tokens.
        grids: of the pictures.
        pictures: row-major patches of each.
        video: frames, or nothing.
        sizes: of all sequences of the vision encoder.
        patches: of each of them, in block order.
        clips: mel frames of each; the last is zero.
        film: which of the vision encoder's items the video is.
    """

    ids: list[int] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)
    video: Tensor | None = None
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    clips: list[Tensor] = field(default_factory=list)
    film: int = 0


def write(made: Modules, parts: list[tuple[Any, ...]], dtype: torch.dtype) -> Prompt:
    """A prompt with random items and random text between them.

    Args:
        made: the model.
        parts: ("picture", rows, cols), ("video", groups, side), ("sound", frames) or ("text", tokens).
        dtype: of what encoders read.
    """
    vision, audio = made.encoders.values()
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    prompt, pixels = Prompt(), vision.channels * vision.patch**2
    for kind, *shape in parts:
        prompt.ids += torch.randint(0, 500, (3,), generator=generator).tolist()
        match kind, shape:
            case "text", [tokens]:
                prompt.ids += torch.randint(0, 500, (tokens,), generator=generator).tolist()
            case "sound", [frames]:
                prompt.clips.append(torch.cat([normal(frames - 1, audio.mels), normal(1, audio.mels) * 0]))
                prompt.ids += [audio.token] * audio.rows((frames,))
            case "picture", [rows, cols]:
                prompt.grids.append((rows, cols))
                prompt.pictures.append(normal(rows * cols, pixels))
                prompt.sizes.append((1, rows, cols))
                prompt.patches.append(prompt.pictures[-1][vision.order(rows, cols)])
                prompt.ids += [vision.start_token, *[vision.token] * (rows * cols // 4), vision.end_token]
            case "video", [groups, side]:
                patch, frames, prompt.film = vision.patch, vision.frames, len(prompt.grids)
                prompt.video = normal(groups * frames, vision.channels, side * patch, side * patch)
                cut = prompt.video.view(groups, frames, vision.channels, side, patch, side, patch)
                rows = cut.permute(0, 3, 5, 1, 2, 4, 6).reshape(groups, side**2, frames * pixels)
                prompt.patches += rows[:, vision.order(side, side)]
                prompt.sizes += [(frames, side, side)] * groups
                for _ in range(groups):
                    prompt.ids += [vision.start_token, *[vision.token] * (side**2 // 4), vision.end_token, 7]
    return prompt


def ask(theirs: Any, prompt: Prompt) -> Tensor:
    """Their logits.

    Their forward takes pictures or a video, not both, and fails on the features of its own video encoder;
    so it is given the features, as its own functions make them.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling as Found

    known: dict[str, Any] = {}
    features: list[Tensor] = []
    if prompt.pictures:
        found = theirs.get_image_features(torch.cat(prompt.pictures), torch.tensor(prompt.grids))
        features += found.pooler_output
        known = {"image": found}
    if prompt.video is not None:
        video = theirs.get_video_features(prompt.video).pooler_output
        features.insert(prompt.film, video.flatten(0, 1))
        known = {"image": Found(pooler_output=features)} if prompt.pictures else {}
        known = known or {"video": Found(pooler_output=[video])}
    if prompt.clips:
        longest = max(map(len, prompt.clips))
        pad = [torch.cat([clip, clip.new_zeros(longest - len(clip), clip.shape[1])]) for clip in prompt.clips]
        mask = torch.stack([torch.arange(longest) < len(clip) - 1 for clip in prompt.clips])
        sound = {"input_features": torch.stack(pad), "input_features_mask": mask}
    else:
        sound = {}
    ids = torch.tensor([prompt.ids])
    return theirs(ids, mm_encoder_outputs=known, use_cache=False, **sound).logits[0]


def encode(ours: Omni, prompt: Prompt) -> dict[str, Tensor]:
    """Rows of our encoders."""
    rows = {}
    for name, sizes, data in (
        ("vision", prompt.sizes, prompt.patches),
        ("audio", [(len(clip),) for clip in prompt.clips], prompt.clips),
    ):
        model = ours.get_submodule(name)
        pieces = Pieces.all(sizes, [model.config.rows(size) for size in sizes])
        spans = [model.config.reads(0, model.config.rows(size), size) for size in sizes]
        read = [part[slice(*span)] for part, span in zip(data, spans, strict=True)]
        rows[name] = model(read, model.context(pieces))
    return rows


def check(theirs: Any, ours: Omni, want: Tensor, got: Tensor) -> None:
    """Logits, and the gradient of every parameter, each relative to its largest element."""
    assert want.std() >= 0.5
    assert (got - want).abs().max() <= CLOSE[got.dtype] * want.abs().max()
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for out in (got, want):
        out.backward(cotangent.to(got.dtype))
    live = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    buffers = {name for name, _ in ours.named_buffers()}
    for name, gradient in gather(ours.made, live).items():
        if (mine := own(ours.made, name)) not in buffers:
            found = ours.get_parameter(mine).grad
            error = (torch.zeros_like(gradient) if found is None else found) - gradient
            assert error.abs().max() <= ROUNDED[got.dtype] * gradient.abs().max(), name


PROMPTS = {
    "pictures": [("picture", 2, 4), ("picture", 10, 6), ("text", 9)],
    "video": [("text", 4), ("video", 3, 4)],
    "sound": [("sound", 50), ("sound", 35), ("text", 5)],
    "all": [
        ("picture", 8, 8),
        ("sound", 35),
        ("video", 2, 6),
        ("sound", 50),
        ("picture", 4, 2),
        ("text", 40),
        ("sound", 6),
    ],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    made = modules()
    theirs, ours = pair(made, 1, dtype)
    prompt = write(made, PROMPTS[name], dtype)
    want = ask(theirs, prompt)
    got = ours(torch.tensor(prompt.ids), encode(ours, prompt))
    check(theirs, ours, want, got)


@pytest.mark.parametrize("pruning", [0.3, 0.7])
def test_a_video_of_which_rows_are_dropped(pruning: float, dtype: torch.dtype) -> None:
    """Tokens of dropped rows go too: the prompt is shorter, and nothing keeps their places."""
    made = modules(pruning=pruning)
    theirs, ours = pair(made, 2, dtype)
    groups, cells = 5, 4
    prompt = write(made, [("text", 4), ("video", groups, 4), ("text", 8)], dtype)
    want = ask(theirs, prompt)
    rows = encode(ours, prompt)["vision"]
    chosen = choose(rows, groups, cells, pruning)
    assert len(chosen) == kept(groups, cells, pruning) < groups * cells
    ids = torch.tensor(prompt.ids)
    stays = ids != made.encoders["vision"].token
    stays[(~stays).nonzero().flatten()[chosen]] = True
    assert len(want) == stays.sum()
    check(theirs, ours, want, ours(ids[stays], {"vision": rows[chosen]}))
