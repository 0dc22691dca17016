"""Write checkpoints while training, so that a kill at any moment costs little and breaks nothing."""

from __future__ import annotations

import io
import signal
import threading
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pliant._files import atomic_path, sync, writing
from pliant.train.processes import agreed, gathered
from pliant.train.saved import ADVICE, LAST, PREVIOUS

# Windows has no SIGUSR1.
_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


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
    """Write a checkpoint after each epoch, and within epochs after some time; stop on a signal.

    Lightning's own ModelCheckpoint would write one after the last step of an epoch too, and a
    run that goes on from there skips the epoch's validation (2.6).

    SIGTERM, and SIGUSR1 where the program does nothing else on it, end the run after the step at
    hand, with a checkpoint, and in all processes after the same step, whichever got the signal.
    Lightning's handler would talk to the other processes from within the signal, which may be
    in the middle of what they have to say to one another already (2.6).

    Args:
        folder: of the run.
        minutes: between checkpoints within an epoch; 0: after every step; None: none.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self.path, self.minutes = folder / LAST, minutes
        self.saved = monotonic()
        self.stop = False
        self._before: dict[int, Any] = {s: signal.getsignal(s) for s in _STOPPING}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and listen for signals; Lightning restores the handlers at the end.

        Raises:
            ValueError: the processes do not go on from the same step.
        """
        steps = gathered(trainer.global_step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes of this run go on from different steps, {steps}: its folder has to be on "
                f"a disk that all machines share"
            )
        self.saved = monotonic()
        self.stop = trainer.received_sigterm
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _STOPPING:
            if number == signal.SIGTERM or self._before[number] == signal.SIG_DFL:
                signal.signal(number, self._heard)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, but not after an epoch's last step: validation comes first.

        Raises:
            SIGTERMException: a signal told to stop.
        """
        due = self.minutes is not None and monotonic() - self.saved >= 60 * self.minutes
        # Clocks differ, and all take part in saving.
        due, stop = agreed(due, self.stop, device=trainer.strategy.root_device)
        if batch_idx + 1 >= trainer.num_training_batches:
            return
        if due or stop:
            self._save(trainer)
        if stop:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; the epoch's row is in the history.

        Raises:
            SIGTERMException: a signal told to stop, and there is an epoch left.
        """
        self._save(trainer)
        (stop,) = agreed(self.stop, device=trainer.strategy.root_device)
        if stop and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise SIGTERMException

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
        before = self._before[number]
        if callable(before):
            before(number, frame)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self.saved = monotonic()
