"""Against transformers: encoder, projector, gradients, mel features, key tables; random values everywhere."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weft.data.mel import mel, mel_filters
from weft.models.audio import AudioEncoder
from weft.models.hf_audio import (
    LIVE,
    PUBLISHED,
    UNUSED,
    read_config,
    tensor_links,
    unpublishable,
    write_config,
)
from weft.models.presets import PARAKEET_OMNI, PARAKEET_OMNI_TINY
from weft.nn.context import Context
from weft.ops.segments import Segments
from weft.plan.items import Pieces
from weft.spec.audio import AudioConfig

CONFIGS = {
    "tiny": PARAKEET_OMNI_TINY,
    "biases": replace(
        PARAKEET_OMNI_TINY, attention_bias=True, conv_bias=True, scale_input=True, projector_bias=True
    ),
    "bare": replace(PARAKEET_OMNI_TINY, conv_kernel=5, subsampling=4, num_attention_heads=1),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def omni() -> Any:
    """The module of the whole model."""
    return import_module("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")


def theirs(config: AudioConfig, device: str = "cpu") -> Any:
    """The parts of the omni model that sound goes through, under their names in it."""
    from transformers import ParakeetEncoder, ParakeetEncoderConfig

    values = {k: v for k, v in write_config(config).items() if k != "model_type"}
    given = ParakeetEncoderConfig(**values)
    given._attn_implementation = "sdpa"  # the eager form takes the softmax in fp32 whatever the dtype
    model = nn.Module()
    with torch.device(device):
        model.audio_tower = ParakeetEncoder(given)
        model.embed_audio = omni().NemotronH_Omni_Reasoning_V3MultiModalProjector(
            config.hidden_size, config.projector_size, config.output_size, bias=config.projector_bias
        )
        model.embed_audio.layer_norm = nn.RMSNorm(config.hidden_size, eps=1e-5)  # theirs rounds to fp32
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        draw = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(draw.square() + 0.3)
        elif tensor.is_floating_point() and "inv_freq" not in name:
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
            one = tensor.dim() == 1 and name.endswith("weight")
            tensor.copy_(draw * scale + one)


def gather(config: AudioConfig, live: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {spec.name: torch.full(spec.shape, torch.nan, dtype=torch.float64) for spec in config.params()}
    for link in tensor_links(config, LIVE):
        box = tuple(slice(a, a + n) for a, n in zip(link.start, link.size, strict=True))
        assert live[link.theirs].shape == link.shape
        found[link.ours][box] = live[link.theirs].view(link.size)
    return found


def pair(config: AudioConfig) -> tuple[Any, AudioEncoder]:
    model = theirs(config).double()
    randomize(model)
    ours = AudioEncoder(config).to_empty(device="cpu").double()
    live = dict([*model.named_parameters(), *model.named_buffers()])
    ours.load_state_dict(gather(config, {name: tensor.detach() for name, tensor in live.items()}))
    return model, ours


def ask(model: Any, features: Tensor, mask: Tensor | None) -> list[Tensor]:
    """What the omni model puts in place of each clip's tokens."""
    whole = SimpleNamespace(audio_tower=model.audio_tower, embed_audio=model.embed_audio)
    found = omni().NemotronH_Omni_Reasoning_V3.get_audio_features(whole, features, mask)
    rows = found.pooler_output
    if mask is None:
        return list(rows.split(len(rows) // len(features)))
    lengths = model.audio_tower._get_subsampling_output_length(mask.sum(-1) + 1)
    return list(rows.split(lengths.tolist()))


def answer(model: AudioEncoder, clips: list[Tensor]) -> tuple[Tensor, ...]:
    config = model.config
    sizes = [(len(clip),) for clip in clips]
    pieces = Pieces.all(sizes, [config.rows(size) for size in sizes])
    spans = [slice(*config.frames(0, config.rows(size), size)) for size in sizes]
    data = [clip[span] for clip, span in zip(clips, spans, strict=True)]
    return model(data, Context(Segments(pieces.lengths), pieces=pieces)).split(pieces.lengths)


def sound(config: AudioConfig, frames: int) -> Tensor:
    """Features of a clip as the extractor gives them: the last frame is zero."""
    x = torch.randn(frames, config.mels, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)
    return torch.cat([x[: frames - 1], torch.zeros_like(x[:1])])


def check(model: Any, ours: AudioEncoder, wanted: list[Tensor], found: tuple[Tensor, ...]) -> None:
    """Values, and the gradient of every parameter."""
    torch.testing.assert_close(list(found), wanted, rtol=1e-9, atol=1e-9)
    factors = [
        torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype) for y in wanted
    ]
    for part in (model, ours):
        part.zero_grad()
    for ys in (wanted, found):
        torch.stack([(y * f).sum() for y, f in zip(ys, factors, strict=True)]).sum().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    expected = gather(ours.config, grads | buffers)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [2, 17, 34, 50, 73])
def test_one_clip(name: str, frames: int) -> None:
    """With the mask that the extractor gives: it leaves out the last frame, and the rows count it."""
    config = CONFIGS[name]
    model, ours = pair(config)
    clip = sound(config, frames)
    mask = torch.arange(frames)[None] < frames - 1
    check(model, ours, ask(model, clip[None], mask), answer(ours, [clip]))


@pytest.mark.parametrize("frames", [1, 8, 9, 50])
def test_one_clip_without_mask(frames: int) -> None:
    config = replace(PARAKEET_OMNI_TINY, closing=0)
    model, ours = pair(config)
    clip = torch.randn(frames, config.mels, dtype=torch.float64)
    check(model, ours, ask(model, clip[None], None), answer(ours, [clip]))


def test_clips_of_different_lengths() -> None:
    """Rows of padded clips are those of the same clips alone.

    But for one row: where a clip has a multiple of 8 frames and one that closes it, transformers keeps a row
    that hears nothing and averages all rows of the batch, padding included. Ours averages the clip's.
    """
    config = PARAKEET_OMNI_TINY
    model, ours = pair(config)
    clips = [sound(config, frames) for frames in (17, 50, 35, 6)]
    longest = max(map(len, clips))
    padded = torch.stack([torch.cat([c, c.new_zeros(longest - len(c), config.mels)]) for c in clips])
    mask = torch.stack([torch.arange(longest) < len(c) - 1 for c in clips])
    wanted, found = ask(model, padded, mask), answer(ours, clips)
    assert [len(y) for y in found] == [len(y) for y in wanted] == [3, 7, 5, 1]
    assert not torch.allclose(found[0][-1], wanted[0][-1])
    for a, b in ((found[0][:-1], wanted[0][:-1]), *zip(found[1:], wanted[1:], strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_tables_name_every_tensor_of_the_full_model() -> None:
    model = theirs(PARAKEET_OMNI, "meta")
    live = {name: t.shape for name, t in model.state_dict().items() if not any(u in name for u in UNUSED)}
    found = tensor_links(PARAKEET_OMNI, LIVE)
    assert {link.theirs: link.shape for link in found} == dict(live)
    assert len({link.theirs for link in found}) == len(found)
    count = sum(spec.numel for spec in PARAKEET_OMNI.params() if not spec.buffer)
    assert count == sum(p.numel() for p in model.parameters())


def test_published_names_are_what_transformers_renames() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    rules = get_checkpoint_conversion_mapping("NemotronH_Omni_Reasoning_V3") or ()
    assert rules
    pairs = zip(*(tensor_links(PARAKEET_OMNI_TINY, naming) for naming in (PUBLISHED, LIVE)), strict=True)
    for link, live in pairs:
        name = link.theirs
        for rule in rules:
            name, _ = rule.rename_source_key(name)
        assert name == live.theirs


def test_configs_go_both_ways() -> None:
    for config in (PARAKEET_OMNI, *CONFIGS.values()):
        values = write_config(config)
        found, problems = read_config(values, config.output_size, config.token)
        assert (found, problems, unpublishable(config)) == (config, [], [])
    published = {"num_mel_bins": 128, "projection_hidden_size": 4096, "convolution_bias": False}
    assert read_config(published, 2688, 27) == (PARAKEET_OMNI, [])
    _, problems = read_config({**published, "hidden_act": "gelu", "conv_kernel_size": 8}, 2688, 27)
    assert sorted(problem.path for problem in problems) == ["conv_kernel", "hidden_act"]
    assert unpublishable(replace(PARAKEET_OMNI, conv_norm="rms"))[0].path == "conv_norm"


@pytest.mark.parametrize("samples", [400, 8000, 16001, 40000])
def test_mel_features(samples: int) -> None:
    from transformers import ParakeetFeatureExtractor

    extractor = ParakeetFeatureExtractor(feature_size=128)
    np.testing.assert_allclose(mel_filters(128, 512, 16000), extractor.mel_filters.numpy().T, atol=1e-8)
    clip = np.random.default_rng(samples).normal(size=samples).astype(np.float32) / 8
    wanted = extractor(clip, sampling_rate=16000, return_tensors="pt")
    found = mel(clip, PARAKEET_OMNI)
    assert found.shape == (PARAKEET_OMNI.mel_frames(samples), 128)
    assert wanted.attention_mask.sum() == len(found) - 1
    np.testing.assert_allclose(found, wanted.input_features[0].numpy(), atol=2e-4)
