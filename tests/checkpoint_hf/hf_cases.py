"""Hugging Face model directories made without transformers: random bits under published names."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import CONFIG
from weft.models.hf_hybrid import PUBLISHED, Naming, tensor_links, write_config
from weft.spec.hybrid import HybridConfig

WIDE = ("A_log", ".D", "dt_bias", "e_score_correction_bias")  # published in fp32 among bf16 weights
SIDE = {
    "tokenizer.json": b'{"model": {"vocab": {"<s>": 7}}, "added_tokens": [{"id": 8, "content": "</s>"}]}',
    "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}}',
    "generation_config.json": b'{"eos_token_id": [2, 11]}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "modeling_nemotron_h.py": b"raise SystemExit('code of a model was run')",
    "LICENSE": b"terms",
}
CASES = {
    "all kinds, latent, MTP": CONFIG,
    "no latent": replace(CONFIG, moe_latent_size=0),
    "two depths": replace(CONFIG, pattern="*M-E/ME/ME"),
    "dense": replace(CONFIG, pattern="M-M*", mtp_num_depths=0),
    "one inner layer": replace(CONFIG, pattern="E/E"),
    "tied": replace(CONFIG, pattern="M*", mtp_num_depths=0, tie_word_embeddings=True),
}


def random_tensors(config: HybridConfig, naming: Naming = PUBLISHED, seed: int = 0) -> dict[str, Tensor]:
    """Random bits, NaN patterns included, in the dtypes of published files."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for link in tensor_links(config, naming):
        dtype = torch.float32 if link.theirs.endswith(WIDE) else torch.bfloat16
        bits = torch.randint(0, 256, (*link.shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        found[link.theirs] = bits.view(dtype).view(link.shape)
        if link.copy:
            found[link.theirs] = found["backbone.embeddings.weight"].clone()
    return found


def publish(folder: Path, config: HybridConfig, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A model directory with these tensors, in this many shards."""
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[i::shards] for i in range(shards)]
    table = {}
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        table |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = write_config(config) | {"auto_map": {"AutoConfig": "evil.Config"}, "rope_theta": 10000}
    (folder / "config.json").write_text(json.dumps(values, indent=3))  # an indent of its own
    for name, data in SIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal keys, dtypes, shapes and bits."""
    return left.keys() == right.keys() and all(
        a.dtype == (b := right[name]).dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for name, a in left.items()
    )


def others(folder: Path) -> dict[str, bytes]:
    """Files that are not weights."""
    files = (f for f in folder.rglob("*") if f.is_file() and ".safetensors" not in f.name)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}
