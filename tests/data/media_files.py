"""Small pictures, sounds, videos and conversations, and a run's view of them."""

import io
import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from weft.data.media.items import Media
from weft.data.multimodal import Multimodal, open_multimodal
from weft.spec.audio import AudioConfig
from weft.spec.data import DataConfig, TokenizerConfig
from weft.spec.vision import VisionConfig

_SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "output_size": 8,
    "projector_size": 8,
}
VISION = VisionConfig(
    **_SIZES, token=300, start_token=301, end_token=302, patch=4, min_patches=4, max_patches=64, video_grid=4
)
AUDIO = AudioConfig(**_SIZES, token=303, mels=16, subsampling_channels=2)
ENCODERS = {"vision": VISION, "audio": AUDIO}
VOCABULARY = 310


def settings(source: Path | str, **changes) -> DataConfig:
    """Data settings with a tiny tokenizer and nothing held out."""
    known = {"seq_length": 128, "valid_fraction": 0.0, "tokenizer": TokenizerConfig(vocab_size=257)}
    return DataConfig(source=str(source), **(known | changes))


def index(config: DataConfig, cache: Path, encoders=ENCODERS, notes=None) -> Multimodal:
    """The data of a run."""
    return open_multimodal(config, encoders, VOCABULARY, cache, (notes if notes is not None else []).append)


def picture(height: int = 16, width: int = 16, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image | None = None, form: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    stream = io.BytesIO()
    (image or picture()).save(stream, form, **options)
    return stream.getvalue()


def gif(frames: int, size: int = 16) -> bytes:
    """An animated picture whose frames get brighter."""
    grey = [Image.new("RGB", (size, size), (240 * i // frames + 10,) * 3) for i in range(frames)]
    return png(grey[0], "GIF", save_all=True, append_images=grey[1:])


def wav(samples: int = 4000, rate: int = 16000, width: int = 2, channels: int = 1, seed: int = 0) -> bytes:
    """The bytes of a wave file of noise."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.random.default_rng(seed).bytes(samples * width * channels))
    return stream.getvalue()


def chat(*parts, answer: str = "yes") -> dict:
    """One question and its answer."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def image(name: str, **more) -> dict:
    """A part that names a picture."""
    return {"type": "image_url", "image_url": {"url": name}, **more}


def write(folder: Path, rows, **files: bytes) -> Path:
    """``data.jsonl`` of rows (or lines of text), and files beside it; ``__`` in a name stands for a dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    path = folder / "data.jsonl"
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


__all__ = ["AUDIO", "ENCODERS", "VISION", "VOCABULARY", "Media"]
