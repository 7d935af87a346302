"""Checkpoints of a training run: what they hold, when they are written, how a run resumes."""

from pathlib import Path
from typing import Any

import torch

from weft.checkpoint.load import Checkpoint, match, open_checkpoint
from weft.checkpoint.model import run_of
from weft.checkpoint.save import AsyncSaver, save
from weft.checkpoint.shard import Piece
from weft.checkpoint.steps import check_free, latest
from weft.config.errors import CheckpointError
from weft.config.load import to_dict, to_yaml
from weft.config.resolve import leaves
from weft.config.text import parse
from weft.parallel.comm import Comm
from weft.spec.run import RunConfig
from weft.train.loop import Trainer


class Saving:
    """Writes and reads the checkpoints of one run.

    Attributes:
        source: the checkpoint that the run goes on from, if any.
        tokenizer: fingerprint of the run's tokenizer; saved, so that no run goes on with other token ids.
    """

    def __init__(self, config: RunConfig, comm: Comm) -> None:
        self.config, self.comm = config, comm
        self.root = config.directory / "checkpoints"
        self.background = AsyncSaver() if config.checkpoint.async_save else None
        self.writers = comm.twin() if self.background else comm  # the saver's thread needs its own
        self.source = self._source()
        self.tokenizer = ""
        self._text = to_yaml(config)
        self._pieces: list[Piece] = []  # views of what the trainer keeps: found once, not at each save

    def _source(self) -> Checkpoint | None:
        load = self.config.checkpoint.load
        if load == "auto":
            return open_checkpoint(self.root) if latest(self.root) else None
        return open_checkpoint(Path(load)) if load else None

    def beside(self, name: str) -> Path | None:
        """A folder of the run that the source belongs to, if it is there."""
        folder = run_of(self.source.path) / name if self.source else None
        return folder if folder and folder.is_dir() else None

    def kept_tokenizer(self) -> Path | None:
        """Where the tokenizer of the source lies: its run's own, or the one that an import carried."""
        folders = (self.beside("tokenizer"), self.beside("hf"))
        return next((folder for folder in folders if folder and (folder / "tokenizer.json").is_file()), None)

    def changes(self) -> list[str]:
        """Settings that differ from those of the source, as ``name: old -> new``."""
        text = self.source.meta.get("config") if self.source else None
        if not isinstance(text, str) or self.source is None:
            return []
        old = dict(leaves(parse(text, str(self.source.path)).values))
        new = dict(leaves(to_dict(self.config)))
        ignored = ("run.", "checkpoint.", "logger.")
        return [
            f"{name}: {old[name]} -> {value}"
            for name, value in new.items()
            if name in old and not name.startswith(ignored) and _plain(old[name]) != _plain(value)
        ]

    def check(self) -> None:
        """Refuse a source that cannot be gone on from with these settings.

        Raises:
            CheckpointError: another tokenizer or another precision.
        """
        if self.source is None:
            return
        meta, place = self.source.meta, self.source.path
        if meta.get("tokenizer", self.tokenizer) != self.tokenizer:
            raise CheckpointError(
                f"{place} was trained with another tokenizer than the one of this corpus; name the tokenizer "
                "of that run in data.tokenizer.path"
            )
        precision = self.config.train.precision
        if meta.get("precision", precision) != precision:
            raise CheckpointError(
                f"{place} was trained in {meta['precision']}, this run asks for {precision}; set "
                f"train.precision={meta['precision']}, or export and import it to keep its weights alone"
            )

    def position(self) -> dict[str, Any] | None:
        """Where the data stood, or None for a new run."""
        return self.source.meta.get("data") if self.source else None

    def restore(self, trainer: Trainer) -> int:
        """Fill the trainer from the checkpoint; returns the steps done (0 for a new run or an import).

        Raises:
            CheckpointError: a damaged checkpoint, one of another model (all differences listed), or later
                steps in the run directory that this run would meet.
        """
        done = self._fill(trainer, self.source) if self.source else 0
        if self.config.checkpoint.save:
            check_free(self.root, done)
        return done

    def _fill(self, trainer: Trainer, source: Checkpoint) -> int:
        match(source, self.config.modules.params(), "model/")
        weights_only = "optimizer_steps" not in source.meta  # an import: a new run begins from it
        for piece in trainer.pieces():
            if not weights_only or piece.name.startswith("model/"):
                piece.tensor.copy_(source.read(piece.name, piece.box))
        if weights_only:
            trainer.adopt()
            return 0
        trainer.publish()
        trainer.steps = source.meta["optimizer_steps"]
        trainer.samples, trainer.tokens = source.meta["samples"], source.meta["tokens"]
        trainer.seconds = source.meta["seconds"]
        torch.set_rng_state(source.read("rng/torch"))
        return source.step

    def _is_source(self, step: int) -> bool:
        """Whether the run was resumed from this very step, so that it lies there already."""
        source = self.source
        return (
            source is not None and source.step == step and source.path.parent.resolve() == self.root.resolve()
        )

    def maybe(self, step: int, trainer: Trainer) -> None:
        """Save where ``checkpoint.save_interval`` asks for it."""
        every = self.config.checkpoint.save_interval
        if every and step % every == 0 and step < self.config.train.train_iters:
            self.save(step, trainer)

    def save(self, step: int, trainer: Trainer, final: bool = False) -> None:
        """Write the checkpoint of ``step``; in the background if asked, but never the final one."""
        if not self.config.checkpoint.save or self._is_source(step):
            return
        if not self._pieces:
            owned = (piece for piece in trainer.pieces() if piece.owned)
            self._pieces = [Piece(piece.name, piece.tensor, piece.shape, piece.box.start) for piece in owned]
        pieces = [*self._pieces, Piece.whole("rng/torch", torch.get_rng_state())]
        meta = {
            "config": self._text,
            "precision": self.config.train.precision,
            "tokenizer": self.tokenizer,
            "data": trainer.loader.state(trainer.samples),
            "samples": trainer.samples,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "optimizer_steps": trainer.steps,
        }
        write = self.background.save if self.background else save
        write(self.root, step, pieces, meta, self.writers, self.config.checkpoint.most_recent_k)
        if final:
            self.close()

    def close(self) -> None:
        """Wait for a background save; an error of it is raised here."""
        if self.background:
            self.background.wait()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
