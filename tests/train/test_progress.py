"""The progress bar: on one line, however narrow the terminal is."""

from __future__ import annotations

import io

import pytest
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from _runs import TINY, Stop
from pliant.train import fit, override

WIDTHS = (60, 80, 200)


class Look(Callback):
    """Draws the bar of each step at several widths; with a metric more, where it has a name."""

    def __init__(self, metric: str = "") -> None:
        self.metric, self.drawn = metric, {width: [] for width in WIDTHS}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.metric:
            self.log(self.metric, 0.5, prog_bar=True, logger=False)
        for width, drawn in self.drawn.items():
            console = Console(file=io.StringIO(), width=width, color_system=None)
            console.print(trainer.progress_bar_callback.progress.make_tasks_table(_shown(trainer)))
            drawn.append(console.file.getvalue().splitlines())


def _shown(trainer):
    return [task for task in trainer.progress_bar_callback.progress.tasks if task.visible]


@pytest.mark.parametrize("metric", ["", "a_metric_of_the_users_own_with_a_long_name"])
def test_the_bar_stays_on_one_line(tmp_path, metric):
    look = Look(metric)
    with pytest.raises(KeyError, match="stopped"):  # of many epochs, whose numbers are wide
        fit(override(TINY, ["epochs=1000"]), tmp_path / "run", callbacks=[look, Stop(12)])
    for width, drawn in look.drawn.items():
        assert len(drawn) == 12
        assert [len(lines) for lines in drawn] == [1] * 12, width
    for width in (200,) if metric else (80, 200):
        (last,) = look.drawn[width][-1]
        assert last.startswith("Epoch 1/999")
        assert all(text in last for text in (" 4/8 ", "it/s loss: ", " val: 0.", metric))
        assert "…" not in last
