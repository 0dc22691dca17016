"""Write checkpoints while training, so that a kill at any moment costs little and breaks nothing."""

from __future__ import annotations

import io
from pathlib import Path
from time import monotonic
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pliant._files import atomic_path, sync, writing
from pliant.train.saved import ADVICE, LAST, PREVIOUS


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to files, made safe: a checkpoint has its name when it is whole.

    What was ``last.ckpt`` is kept as ``previous.ckpt``. At every moment one of the two is whole.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint under another name, wait for the disk, rename.

        Raises:
            NotWrittenError: the disk is full, or the folder cannot be written.
        """
        path = Path(path)
        content = io.BytesIO()  # torch.save to a file hides why a write failed
        torch.save(checkpoint, content)
        with writing(path, ADVICE), atomic_path(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            sync(temporary)  # before the one that it replaces steps aside
            if path.name == LAST.name and path.is_file():  # not of a callback of the user's
                path.replace(path.with_name(PREVIOUS.name))


class Keep(Checkpoint):
    """Write a checkpoint after each epoch, and within epochs after some time.

    Lightning's own ModelCheckpoint would write one after the last step of an epoch too, and a
    run that goes on from there skips the epoch's validation (2.6).

    Args:
        folder: of the run.
        minutes: between checkpoints within an epoch; 0: after every step; None: none.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.path, self.minutes = folder / LAST, minutes
        self.saved = monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.saved = monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, but not after an epoch's last step: validation comes first."""
        if batch_idx + 1 >= trainer.num_training_batches:
            return
        due = self.minutes is not None and monotonic() - self.saved >= 60 * self.minutes
        due = due or trainer.received_sigterm  # Lightning stops after this step
        if trainer.world_size > 1:  # clocks differ, and all take part in saving
            due = trainer.strategy.broadcast(due)
        if due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; the epoch's row is in the history."""
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved = monotonic()
