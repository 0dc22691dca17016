"""Checkpoints while training: a kill at any moment costs little and breaks nothing."""

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
    """Lightning's checkpoint files, written safely: a checkpoint gets its name when it is whole.

    The former ``last.ckpt`` becomes ``previous.ckpt``, so one of the two is whole at every moment.
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
            sync(temporary)  # on the disk before the last one is renamed
            if path.name == LAST.name and path.is_file():  # a user's callback may save other files
                path.replace(path.with_name(PREVIOUS.name))


class Keep(Checkpoint):
    """Write a checkpoint after each epoch and every few minutes within it; stop on a signal.

    Lightning's ModelCheckpoint would also write one after an epoch's last step, and a run that
    continues from there skips the validation of the epoch (Lightning 2.6).

    SIGTERM, and SIGUSR1 unless the program handles it, end the run with a checkpoint after the current
    step; all processes stop after the same step, whichever of them got the signal. Lightning's own
    handler communicates from within the signal handler, where it can meet another communication of the
    same process (Lightning 2.6).

    Args:
        folder: folder of the run.
        minutes: minutes between checkpoints within an epoch; 0: after every step; None: none.
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
                f"the processes of this run continue from different steps, {steps}; put its folder on a "
                f"disk that all machines share"
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
        """Save if it is time, but not after an epoch's last step, where validation comes first.

        Raises:
            SIGTERMException: a signal told to stop.
        """
        due = self.minutes is not None and monotonic() - self.saved >= 60 * self.minutes
        # The processes agree, because clocks differ and saving needs all of them.
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
