"""A process whose children train and are killed: python _killed.py RUNS, JSON of (FOLDER, RECIPE, POINT)s.

A child, forked once all is imported, writes a checkpoint after every third step of an epoch, and ends
itself by SIGKILL at the point: a callback's hook and a step, or a file that it is about to write or to
give its name. One is done before the next begins. Printed is how each ended: minus the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from pliant.train import Recipe, fit, keeping


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(Callback):
    """Die in one hook, at one step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.die)

    def die(self, trainer, *_):
        if trainer.global_step == self.step:
            kill()


def kill_in(method, name, times):
    """Die in a method of `Path` when the temporary file of that name comes for the n-th time.

    ``write_bytes`` and ``write_text`` have written the half by then, ``replace`` nothing.
    """
    real, seen = getattr(Path, method), count(1)

    def fatal(self, value, *args, **options):
        if self.parent.name.startswith(f".{name}.") and next(seen) == times:
            if method != "replace":
                real(self, value[: len(value) // 2], *args, **options)
            kill()
        return real(self, value, *args, **options)

    setattr(Path, method, fatal)


def train(folder, recipe, what, *where):
    clock = count()
    keeping.monotonic = lambda: next(clock)  # a second a step
    callbacks = []
    if what in ("write_bytes", "write_text", "replace"):
        kill_in(what, *where)
    else:
        callbacks = [Kill(what, *where)]
    resume = Path(folder, "recipe.json").is_file()
    recipe = Recipe.from_dict({**recipe, "checkpoint_minutes": 3 / 60})
    fit(recipe, folder, resume=resume, progress=False, callbacks=callbacks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder, recipe, point in json.loads(sys.argv[1]):
        child = os.fork()
        if not child:
            train(folder, recipe, *point)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # a fork would print it again
