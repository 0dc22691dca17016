"""The progress bar of a run: `Bar`."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn
from rich.table import Column

WIDTH = 40  # characters of the bar itself where there is room, as Lightning has it


class Bar(RichProgressBar):
    """Lightning's progress bar, on one line: where a terminal is narrow, the bar itself is shorter.

    Columns that are too wide even then, such as metrics of long names, are cut off at their end.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to draw; Lightning wraps each column instead."""
        super().on_train_start(trainer, pl_module)
        for column in self.progress.columns if self.progress is not None else ():
            if isinstance(column, BarColumn):
                column.bar_width = None
                column._table_column = Column(max_width=WIDTH)
            elif isinstance(column, ProgressColumn):
                column._table_column = Column(no_wrap=True)
