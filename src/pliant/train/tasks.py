"""What Lightning trains: a network with its loss, metrics and optimiser.

Shapes: x float [B, C, S, S], images; y int64 [B], classes; logits [B, classes].
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from pliant.objectives import ManyPasses, Objective
from pliant.train.distillation import Teaching
from pliant.train.optimizing import make_optimizer, rate
from pliant.train.processes import gathered, share_buffers
from pliant.train.recipe import Recipe
from pliant.train.run import METRICS, write_metrics
from pliant.train.saved import OURS, check_teacher, environment, warn_of_changes
from pliant.train.seeds import mixed_seed, seed_torch, seeded
from pliant.train.sharding import share_out

LOG_EVERY = 10  # steps between two that are logged


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names epoch, step and term."""


class Classification(pl.LightningModule):
    """Train a network to tell classes apart, and record every epoch.

    Accuracy is measured in three ways. ``val_accuracy`` and ``train_accuracy`` are taken alike after
    each epoch: in evaluation mode, without augmentation, with the averaged weights if there are any. One
    is of the validation images, the other of a fixed part of the training images, as many. Their
    difference is ``gap``, the overfitting (or the regularising effect that *CNN Mixture-of-Depths*
    claims, section 5.2). ``running_accuracy`` is that of the training steps, under augmentation and with
    changing weights (with mixup, by the first label). With an objective of several passes, all these are
    of the first pass; the accuracies of the others have the ending of the pass (``val_accuracy_base``).

    Args:
        model: the network, images [B, C, S, S] to logits [B, classes].
        recipe: all other options.
        classes: number of classes.
        steps: steps in an epoch.
        objective: what is minimised.
        teaching: a teacher, which adds its terms to the training loss; validation uses labels alone.

    Attributes:
        history: one row an epoch, oldest first, kept in checkpoints: ``epoch`` (from 0),
            ``train_loss`` and its terms (``train_cross_entropy``), ``val_loss``, ``train_ce`` (cross
            entropy on the images of ``train_accuracy``, without label smoothing: what *CondConv* calls
            capacity, section 4.1), ``train_accuracy``, ``running_accuracy``, ``val_accuracy``, ``gap``
            (all in [0, 1]), ``lr`` of the last step, ``seconds``. With several passes also
            ``val_accuracy_base``, with `test_each` also ``test_accuracy`` (and ``test_accuracy_base``).
        unreadable: paths of images that could not be read, kept in checkpoints. Rows and checkpoints
            have those of all processes.
        best: ``{"epoch": ..., "weights": ...}`` of the first epoch with the highest validation accuracy
            (the mean over all passes), on the CPU, kept in checkpoints. Empty in the first epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        classes: int,
        steps: int,
        objective: Objective,
        teaching: Teaching | None = None,
    ) -> None:
        super().__init__()
        self.model, self.teaching = model, teaching
        self.recipe, self.classes, self.steps = recipe, classes, steps
        self.objective: Any = objective
        self.mixup = _mixup(recipe, classes)
        self.history: list[dict[str, float]] = []
        self.unreadable: set[str] = set()
        self.best: dict[str, Any] = {}
        self.environment = environment(recipe)
        # By the column of the history; those of further passes come last.
        parts = ("val", "test")[: 1 + recipe.test_each]
        first = [f"{part}_accuracy" for part in ("train", "running", *parts)]
        further = [f"{part}_accuracy{ending}" for ending in self._endings[1:] for part in parts]
        self.accuracy: Any = nn.ModuleDict({name: _accuracy(classes) for name in (*first, *further)})
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.train_ce = MeanMetric(nan_strategy="disable")
        self.terms: dict[str, MeanMetric] = {}
        self._unchecked: tuple[int, int, dict[str, Tensor]] | None = None
        self._started = time.perf_counter()
        self._resumed: dict[str, Any] | None = None
        self._lr = recipe.lr

    def configure_model(self) -> None:
        """Take this process's share of the network, if the recipe says so."""
        if self.recipe.strategy == "fsdp":
            share_out(self.model, self.device_mesh)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.model(self._laid(x))
        return logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser, and the learning rate as a function of the step."""
        optimizer = make_optimizer(self.model, self.recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate(self.recipe, step, self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the teacher to the network's device."""
        if self.teaching is not None:
            self.teaching.to(self.device, channels_last=self.recipe.channels_last)

    def on_train_start(self) -> None:
        """Restore the sums of the epoch, in a run that is resumed within it."""
        if self._resumed is None:
            return
        self._started = time.perf_counter() - self._resumed["seconds"]
        _fill(self.accuracy["running_accuracy"], self._resumed["running"])
        for name, state in self._resumed["terms"].items():
            _fill(self._term(name), state)
        self._resumed = None

    def on_train_epoch_start(self) -> None:
        """Tell the batches which epoch it is, and start the clock."""
        batches: Any = self.trainer.train_dataloader
        batches.set_epoch(self.current_epoch)
        self._started = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The loss of one batch."""
        self._seed(number, "forward")
        x, y = batch
        target = y
        if self.mixup is not None:
            even = len(x) - len(x) % 2  # an incomplete batch may be odd
            x, y = x[:even], y[:even]
            with seeded(self.recipe.seed, self.current_epoch, self.global_rank, number, "mixup"):
                x, target = self.mixup(x, y)
        watch = None if self.teaching is None else self.teaching.watch(self.model)
        with watch or nullcontext({}) as seen:
            (logits, *_), outputs = self._run(x)
        if logits.shape != (len(x), self.classes):
            raise ValueError(
                f"the network gives outputs of shape {tuple(logits.shape)} for {len(x)} images of "
                f"{self.classes} classes; wanted ({len(x)}, {self.classes}), so num_classes={self.classes}"
            )
        terms = self.objective(outputs, target)
        if self.teaching is not None:
            terms = self.teaching.terms(terms, self.objective, outputs, seen, self._laid(x))
        loss = torch.stack(list(terms.values())).sum()
        self._watch(terms)
        for name, term in terms.items():
            self._term(name).update(term.detach())
        self.accuracy["running_accuracy"].update(logits.detach().argmax(1), y)
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        # Only what is written or shown is logged, because logging costs small networks time.
        if (self.global_step + 1) % LOG_EVERY == 0:
            for name, term in terms.items():
                self.log(f"step/{name}", term.detach())
            self.log("step/lr", self._lr)
        if self.trainer.progress_bar_callback is not None:
            self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Check the last step's loss before anything is kept; score the same network in all processes."""
        self._look()
        share_buffers(self.model)

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the validation images (0), of training images (1), of test images (2)."""
        self._seed(number, dataloader_idx, "validation")
        x, y = batch
        part = ("val", "train", "test")[dataloader_idx]
        passes, outputs = ((self(x),), None) if part == "train" else self._run(x)
        for ending, logits in zip(self._endings, passes, strict=False):  # of training images the first
            self.accuracy[f"{part}_accuracy{ending}"].update(logits.argmax(1), y)
        if part == "val":
            loss = torch.stack(list(self.objective(outputs, y).values())).sum()
            # One value an image, because torchmetrics 1.9 ignores weights if it does not look for NaN.
            self.val_loss.update(loss.expand(len(y)))
        elif part == "train":
            self.train_ce.update(F.cross_entropy(passes[0].float(), y, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        """Close the epoch's row, write the history, and log the row."""
        reached = {name: float(metric.compute()) for name, metric in self.accuracy.items()}
        terms = {f"train_{name}": float(metric.compute()) for name, metric in self.terms.items()}
        row = {
            "epoch": self.current_epoch,
            "train_loss": sum(terms.values()),
            **terms,
            "val_loss": float(self.val_loss.compute()),
            "train_ce": float(self.train_ce.compute()),
            **reached,
            "gap": reached["train_accuracy"] - reached["val_accuracy"],
            "lr": self._lr,
            "unreadable": len(set().union(*gathered(self.unreadable))),
            "seconds": time.perf_counter() - self._started,
        }
        for metric in (*self.accuracy.values(), *self.terms.values(), self.val_loss, self.train_ce):
            metric.reset()
        if not math.isfinite(row["val_loss"]):
            raise NonFiniteLossError(
                f"the loss on the validation images is {row['val_loss']} after epoch {row['epoch']}, "
                f"step {self.global_step}{_REMEDY}"
            )
        self.history.append(row)
        if self.global_rank == 0:
            # Lightning's CSVLogger would lose the rows of a resumed run, so the whole file is written anew.
            write_metrics(Path(self.trainer.default_root_dir, METRICS), self.history)
        for name, value in row.items():
            if name not in ("epoch", "seconds"):
                self.log(name, value, rank_zero_only=True)
        # A bar is short.
        self.log("val", row["val_accuracy"], prog_bar=True, logger=False, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add pliant's part; called in every process, after callbacks have averaged the weights."""
        self._look()  # a step whose loss is no number is not kept
        if self.history:
            merits = [_merit(row) for row in self.history]
            epoch = merits.index(max(merits))
            if self.best.get("epoch") != epoch:  # it has just ended
                weights = {
                    name.removeprefix("model."): (
                        value.cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                    )
                    for name, value in checkpoint["state_dict"].items()
                    if name.startswith("model.")
                }
                self.best = {"epoch": epoch, "weights": weights}
        progress = {
            "seconds": time.perf_counter() - self._started,
            "running": _state(self.accuracy["running_accuracy"]),
            "terms": {name: _state(metric) for name, metric in self.terms.items()},
        }
        checkpoint[OURS] = {
            "recipe": self.recipe.as_dict(),
            "environment": self.environment,
            "teacher": None if self.teaching is None else self.teaching.identity,
            "history": self.history,
            "unreadable": sorted(set().union(*gathered(self.unreadable))),
            "best": self.best,
            "progress": gathered(progress),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` kept."""
        ours = checkpoint[OURS]
        check_teacher(ours, None if self.teaching is None else self.teaching.identity)
        self.history = [dict(row) for row in ours["history"]]
        self.unreadable.update(ours["unreadable"])
        self.best = ours["best"]
        self._resumed = ours["progress"][self.global_rank]
        if self.global_rank == 0:
            warn_of_changes(ours["environment"], self.environment, self.trainer.ckpt_path)

    def _seed(self, *purpose: int | str) -> None:
        """Seed the network's random numbers (random channels, dropped paths) by the step."""
        value = mixed_seed(self.recipe.seed, self.current_epoch, self.global_rank, *purpose)
        seed_torch(value, self.device)

    def _laid(self, x: Tensor) -> Tensor:
        """Images in the recipe's memory format."""
        return x.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else x

    def _term(self, name: str) -> MeanMetric:
        """The mean of one term of the loss over the epoch."""
        if name not in self.terms:
            self.terms[name] = MeanMetric(nan_strategy="disable").to(self.device)
        return self.terms[name]

    @property
    def _endings(self) -> tuple[str, ...]:
        """Endings of the objective's passes; the first is empty."""
        return self.objective.endings if isinstance(self.objective, ManyPasses) else ("",)

    def _run(self, x: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """The logits of each pass, and the objective's input, both from one forward of DDP."""
        if isinstance(self.objective, ManyPasses):
            outputs = self.objective.run(self, x)
            return self.objective.pass_logits(outputs), outputs
        logits = self(x)
        return (logits,), logits

    def _watch(self, terms: dict[str, Tensor]) -> None:
        """Refuse a loss that is no number: at once on a CPU, one step later on other devices.

        Reading the current value would make the host wait for the GPU; that of the step before is ready.
        """
        now = (self.current_epoch, self.global_step, {k: t.detach() for k, t in terms.items()})
        if self.device.type != "cpu":
            self._look()
        self._unchecked = now
        if self.device.type == "cpu":
            self._look()

    def _look(self) -> None:
        if self._unchecked is None:
            return
        epoch, step, terms = self._unchecked
        self._unchecked = None
        values = torch.stack(list(terms.values())).tolist()
        for name, value in zip(terms, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss term {name} is {value} in epoch {epoch}, step {step}{_REMEDY}"
                )


_REMEDY = (
    "; checkpoints of earlier epochs are kept. Lower lr, set clip=1, lengthen warmup, or use precision=fp32"
)


def _accuracy(classes: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, average="micro", validate_args=False)


def _merit(row: Mapping[str, float]) -> float:
    """Merit of an epoch: the mean validation accuracy over all passes that are trained."""
    found = [value for name, value in row.items() if name.startswith("val_accuracy")]
    return sum(found) / len(found)


def _state(metric: Metric) -> dict[str, Tensor]:
    """Sums of a metric in this process, on the CPU."""
    state: Any = metric.metric_state  # sums: none of these metrics keeps lists
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _fill(metric: Metric, state: Mapping[str, Tensor]) -> None:
    """Give a metric what `_state` took from one."""
    for name, value in state.items():
        setattr(metric, name, value.to(metric.device))


def _mixup(recipe: Recipe, classes: int) -> Any:
    """Mixup and CutMix by timm, or None. Smoothing is left to the objective."""
    if not (recipe.mixup or recipe.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
