"""A run that stops."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback


class StopAfter(Callback):
    """A run that is killed after some epochs, its checkpoint written."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epochs:
            raise KeyError("killed")
