"""Hugging Face model directories in and out, tensor by tensor, on one CPU.

Importing makes a run directory: ``checkpoints/step_0000000``, ``config.yaml`` with the model section, and
``hf/`` with every file that came with the weights. Exporting writes published names, and those files again;
``config.json`` unchanged where it still describes the model, a new one otherwise.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from weft.checkpoint.hf_source import FLOATS, INDEX, Source, open_source, read_json, side_files
from weft.checkpoint.hf_target import MADE, draft, write_file, write_weights
from weft.checkpoint.load import Checkpoint, match, open_checkpoint
from weft.checkpoint.model import encoders_of, model_config, run_of
from weft.checkpoint.save import save
from weft.checkpoint.shard import Piece
from weft.config.errors import CheckpointError, Problem
from weft.config.load import to_dict
from weft.config.text import dump
from weft.models import hf_hybrid
from weft.models.hf_table import Link
from weft.parallel.comm import SingleComm
from weft.spec.hybrid import HybridConfig

LOG = logging.getLogger(__name__)

CONFIG = Path("config.json")
SIDE = "hf"
NAMED = 1_000_000  # missing tensors that are worth a name


def import_hf(hf_dir: Path, ckpt: Path) -> Path:
    """Make the run directory ``ckpt`` of a Hugging Face model directory; dtypes stay as they are.

    Memory: windows on the weight files, whose pages the system may drop; no tensor is ever held whole.

    Raises:
        CheckpointError: everything wrong with the directory at once (nothing is written then), or ``ckpt``
            exists.
        RunError: the disk is full.
    """
    source = open_source(hf_dir)
    config = _read_config(source)
    if config is None:
        raise source.refusal("cannot be imported")
    if not any(name.startswith("mtp.") for name in source.tensors):
        config = _drop_absent_mtp(source, config)
    links = _account(source, config)
    if source.problems:
        raise source.refusal("cannot be imported")
    shapes = {spec.name: spec.shape for spec in config.params()}
    pieces = [
        Piece(f"model/{link.ours}", source.view(link.theirs).view(link.size), shapes[link.ours], link.start)
        for link in links
        if not link.copy
    ]
    section = dump({"model": to_dict(config)})
    with draft(ckpt) as folder:
        for name in side_files(hf_dir):
            write_file(folder / SIDE / name, (hf_dir / name).read_bytes())
        write_file(folder / "config.yaml", section.encode())
        save(folder / "checkpoints", 0, pieces, {"config": section}, SingleComm())
    return ckpt


def export_hf(ckpt: Path, hf_dir: Path) -> Path:
    """Write a checkpoint as a directory that transformers and other engines load.

    An export that weft wrote earlier is replaced; any other directory must be empty or absent.

    Raises:
        CheckpointError: a damaged checkpoint, a model that the format cannot say, or ``hf_dir`` holds other
            files.
        RunError: the disk is full.
    """
    checkpoint = open_checkpoint(ckpt)
    config = model_config(checkpoint)
    if encoders := encoders_of(checkpoint):
        names = ", ".join(encoders)
        raise CheckpointError(f"{ckpt} has encoders ({names}); this version exports models of text alone")
    match(checkpoint, config.params(), "model/")
    if problems := hf_hybrid.unpublishable(config):
        raise CheckpointError("\n".join([f"{ckpt} cannot be exported:", *_lines(problems)]))
    side = dict(_side(run_of(ckpt)))
    contents = {name: file.read_bytes() for name, file in side.items()}
    if not hf_hybrid.describes(_json(side.get(CONFIG)), config):
        made = hf_hybrid.write_config(config) | _token_ids(side) | {"torch_dtype": _dtype(checkpoint)}
        contents[CONFIG] = (json.dumps(made, indent=2) + "\n").encode()
    with draft(hf_dir, lambda target: _strange(target, set(contents))) as folder:
        for name, data in contents.items():
            write_file(folder / name, data)
        write_weights(folder, checkpoint, hf_hybrid.tensor_links(config))
    return hf_dir


def _read_config(source: Source) -> HybridConfig | None:
    values = read_json(source.path / CONFIG, source.problems)
    if values is None:
        return None
    if values.get("model_type") != hf_hybrid.MODEL_TYPE:
        known = f"weft imports {hf_hybrid.MODEL_TYPE!r}"
        source.problems.append(f"{CONFIG}: model_type is {values.get('model_type')!r}; {known}")
        return None
    config, problems = hf_hybrid.read_config(values)
    source.problems += [f"{CONFIG}: {problem}" for problem in problems]
    return None if problems else config


def _drop_absent_mtp(source: Source, config: HybridConfig) -> HybridConfig:
    """transformers drops the tensors of MTP depths when it saves, and keeps their keys in the config."""
    if config.parts.mtp and source.complete:
        LOG.warning("%s names MTP depths, but has no tensor of them: imported without", source.path)
        return hf_hybrid.without_mtp(config)
    return config


def _account(source: Source, config: HybridConfig) -> tuple[Link, ...]:
    """Every tensor of model and files; whatever does not fit is a problem."""
    live = f"{hf_hybrid.LIVE.prefix}embeddings.weight" in source.tensors
    naming = hf_hybrid.LIVE if live else hf_hybrid.PUBLISHED
    experts = 0 if live else config.pattern.count("E") * config.n_routed_experts
    if experts > len(source.tensors) + NAMED:  # do not even name them
        source.problems.append(f"{CONFIG}: {experts} experts, but there are {len(source.tensors)} tensors")
        return ()
    links = hf_hybrid.tensor_links(config, naming)
    problems, held = source.problems, source.tensors
    for link in links:
        if link.theirs in held:
            found = held[link.theirs]
            if found.shape != link.shape:
                problems.append(f"{link.theirs}: has shape {found.shape}, the config makes it {link.shape}")
            elif found.dtype not in FLOATS:
                problems.append(f"{link.theirs}: is {found.dtype}; quantized weights are not imported")
        elif source.complete and not link.copy:
            problems.append(f"{link.theirs}: missing, the config makes it {link.shape}")
    wanted = {link.theirs for link in links}
    problems += [f"{name}: surplus, the config has no such tensor" for name in held if name not in wanted]
    problems += _mixtures(source, links)
    if not problems:
        problems += _copies(source, links)
    return links


def _mixtures(source: Source, links: Iterable[Link]) -> Iterator[str]:
    """Tensors that become one here must have one dtype."""
    dtypes: dict[str, dict[str, str]] = defaultdict(dict)
    for link in links:
        if link.theirs in source.tensors:
            dtypes[link.ours].setdefault(source.tensors[link.theirs].dtype, link.theirs)
    for ours, found in dtypes.items():
        if len(found) > 1:
            each = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
            yield f"{each}; they become {ours}, so they must have one dtype"


def _copies(source: Source, links: Iterable[Link]) -> Iterator[str]:
    names = {link.ours: link.theirs for link in links if not link.copy}
    for link in links:
        if link.copy and link.theirs in source.tensors:
            one, other = (source.view(name).view(torch.uint8) for name in (link.theirs, names[link.ours]))
            if not torch.equal(one, other):
                yield f"{link.theirs}: differs from {names[link.ours]}, but tie_word_embeddings is true"


def _side(run: Path) -> Iterator[tuple[Path, Path]]:
    """What travels with an export: what came with an import, or the tokenizer that training used."""
    folder = run / SIDE if (run / SIDE).is_dir() else run / "tokenizer"
    if folder.is_dir():
        yield from ((name, folder / name) for name in side_files(folder))


def _json(path: Path | None) -> dict[str, Any]:
    return (read_json(path, []) if path else None) or {}


def _token_ids(side: dict[Path, Path]) -> dict[str, int | None]:
    """Ids of the control tokens, from the tokenizer's own files."""
    named = _json(side.get(Path("tokenizer_config.json")))
    tokens = _json(side.get(Path("tokenizer.json")))
    vocab = tokens.get("model", {}).get("vocab")
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    ids |= {token["content"]: token["id"] for token in tokens.get("added_tokens", [])}
    found: dict[str, int | None] = {}
    for role in ("bos", "eos", "pad"):
        value = named.get(f"{role}_token")
        found[f"{role}_token_id"] = ids.get(value["content"] if isinstance(value, dict) else value)
    return found


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype to load a model in, as config files name it: that of the token table."""
    return str(checkpoint.dtype("model/embed.weight")).removeprefix("torch.")


def _strange(target: Path, names: set[Path]) -> str:
    """Why a directory may not be replaced; nothing if it holds an export by weft of the same files."""
    files = {file.relative_to(target) for file in target.rglob("*") if not file.is_dir()}
    weights = {file for file in files if file.name.endswith((".safetensors", INDEX))}
    metadata = open_source(target).metadata
    if not metadata or any(MADE.items() - held.items() for held in metadata.values()):
        return "it holds weights that weft did not write" if weights else "it is not empty"
    others = sorted(map(str, files - weights - names))
    return f"it holds {', '.join(others[:3])}, which the export would remove" if others else ""


def _lines(problems: Iterable[Problem]) -> list[str]:
    return [f"  {problem}" for problem in problems]
