"""Run a recipe: `fit`. Lightning's Trainer underneath."""

from __future__ import annotations

import copy
import errno
import logging
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from pliant._files import NotWrittenError, writing
from pliant.checkpoint import retold, save
from pliant.compiling import torch_threads
from pliant.objectives import ManyPasses, Objective
from pliant.surgery import methods_in
from pliant.train.batches import eval_size
from pliant.train.data import Data, load_data
from pliant.train.distillation import Teaching
from pliant.train.evaluation import score
from pliant.train.keeping import CheckpointFiles, Keep
from pliant.train.launching import check_launch, environment_plugins
from pliant.train.networks import begun, teaching_of
from pliant.train.objectives import make_objective
from pliant.train.processes import check_devices, gathered, place
from pliant.train.processors import warn_of_narrow_convolutions
from pliant.train.progress import Bar
from pliant.train.recipe import Recipe
from pliant.train.run import (
    BEST,
    IMAGES,
    METRICS,
    RESULT,
    TENSORBOARD,
    Run,
    check_claim,
    claimed,
    read_division,
    read_run,
    write_json,
    write_run,
)
from pliant.train.saved import ADVICE, AGAIN, LAST, PREVIOUS, newest
from pliant.train.seeds import mixed_seed, seeded
from pliant.train.sharding import of_the_first, strategy_of
from pliant.train.tasks import LOG_EVERY, Classification


class Terminated(SystemExit):
    """A signal ended a run that can be resumed; uncaught, the process ends with status 1."""


def fit(
    recipe: Recipe,
    folder: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train a network by a recipe, keep the best epoch on validation, test it once.

    On the CPU, with the same number of threads, the same recipe gives the same weights bit by bit,
    also if the run was killed and resumed at any moment. The random generators are left as they were.

    Args:
        recipe: what to run.
        folder: folder of the run; by default ``runs/<name>-s<seed>``. Afterwards it holds
            ``recipe.json``, ``environment.json`` (versions, commit, machine), ``images.json`` (the
            images by part, `pliant.train.division`), ``metrics.csv``, ``tensorboard/`` if TensorBoard
            is installed, ``checkpoints/{last,previous}.ckpt`` (see `pliant.train.saved`),
            ``best/`` (the network, for `pliant.load`), ``run.json`` and ``run.lock``.
        resume: continue the unfinished run in `folder` from its last checkpoint (see
            ``checkpoint_minutes`` of `Recipe`); return the result of a finished one.
        progress: show a progress bar.
        model: train this network in place instead of building ``recipe.model``. It gets images with
            ``recipe.in_chans`` channels. Not with ``strategy="fsdp"``.
        objective: what is minimised, instead of the recipe's objective.
        teacher: learn from a copy of this network, by ``recipe.distill_args``, instead of from
            ``recipe.teacher``. It sees the same images as the student.
        callbacks: further callbacks of Lightning. In ``on_train_epoch_end`` the row of the epoch is
            ``pl_module.history[-1]``.

    Returns:
        The run. The ``pretrained_cfg`` of its network has the size, normalisation, crop and classes of the
        images, so that `evaluate` and `export` prepare images as in training.

    Raises:
        ValueError: the folder holds something else, another process trains in it, or all its
            checkpoints are damaged; the devices are not there; images that a resumed run began with are
            missing; the network does not fit the data, the objective, the weights or
            the teacher, or `pliant.checkpoint.save` could not save it (all found before training);
            `test_each` without test images; the resumed run had another teacher.
        OSError: the folder cannot be written, or the disk is full; what was kept is whole.
        FileNotFoundError: the data is not there.
        KeyboardInterrupt: Ctrl-C; the run can be resumed.
        Terminated: a ``SystemExit``, after SIGTERM or SIGUSR1; the run can be resumed from the step
            that was running.
        NonFiniteLossError: the loss became NaN or infinite; earlier checkpoints are kept.
        UnreadableImageError: an image cannot be read, and the recipe says ``unreadable="stop"``.

    Example:
        >>> import tempfile
        >>> recipe = Recipe(
        ...     name="tiny", model="resnet20_cifar_mod", model_args={"layers": [2, 1, 1]}, pixels=8,
        ...     epochs=2, batch=128, accelerator="cpu",
        ... )
        >>> with tempfile.TemporaryDirectory() as place:
        ...     run = fit(recipe, f"{place}/run", progress=False)
        >>> len(run.history), run.test_accuracy > 0.2
        (2, True)
    """
    folder = Path(folder) if folder is not None else Path("runs", f"{recipe.name}-s{recipe.seed}")
    if resume and (folder / RESULT).is_file():  # wherever it ran
        check_claim(folder, recipe, resume=resume)
        return read_run(folder)
    check_launch(recipe)
    check_devices(recipe)
    if recipe.strategy == "fsdp" and (model is not None or teacher is not None):
        raise ValueError(
            "strategy=fsdp cannot train a network or teacher that is given as an object; name it in the "
            "recipe, or set strategy=ddp"
        )
    if _first():  # the first process claims the folder for all
        check_claim(folder, recipe, resume=resume)
    with _quiet(), torch_threads(recipe.threads), seeded(recipe.seed, "weights"):
        data = load_data(recipe, read_division(folder) if resume else None)
        if recipe.test_each and data.test is None:
            raise ValueError(
                f"test_each=true needs test images, and data={recipe.data} at path={recipe.path} has none; "
                f"set test_each=false"
            )
        kept = resume and any((folder / name).is_file() for name in (LAST, PREVIOUS))
        network = begun(recipe, data, model, weights=not kept)
        chosen = objective or make_objective(recipe.objective, recipe.objective_args, recipe.smoothing)
        _check_objective(chosen, network)
        teaching = teaching_of(recipe, data, network, teacher)
        about = _about(recipe, data, network)
        with tempfile.TemporaryDirectory() as trial:
            save(network, Path(trial, BEST), **about)  # so that it fails now, not after training
        with _claimed(folder, recipe, resume) as checkpoint:
            if _first():
                write_json(folder / IMAGES, data.division.as_dict())
            trained = copy.deepcopy(network) if recipe.strategy == "fsdp" else network  # left in shares
            task = _train(recipe, data, trained, folder, checkpoint, chosen, teaching, progress, callbacks)
            network.load_state_dict(of_the_first(task.best["weights"]))
            return _finish(recipe, data, network.eval(), folder, task, about)


def _check_objective(objective: Objective, network: nn.Module) -> None:
    """Refuse an objective that cannot train the network; warn where it trains only a part."""
    if isinstance(objective, ManyPasses):
        objective.check(network)
        return
    for method in methods_in(network):
        if method.objective:
            logging.getLogger(__name__).warning(
                "%s does not train all of this network, which %s converted: objective=%s does",
                type(objective).__name__, method.name, method.objective,
            )  # fmt: skip


def _about(recipe: Recipe, data: Data, network: nn.Module) -> dict[str, Any]:
    """Arguments of `save` that describe the images. They and the crop go into ``pretrained_cfg``, too.

    So `evaluate` and `export` prepare images for the network in memory as for the saved one.
    """
    size = (len(data.mean), recipe.pixels, recipe.pixels)
    images = {"mean": data.mean, "std": data.std, "input_size": size}
    config = getattr(network, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        crop = {"crop_pct": recipe.pixels / eval_size(data.val, recipe), "crop_mode": "center"}
        told = retold(config, **images, **crop, interpolation="bilinear", label_names=data.classes)
        vars(network).update(pretrained_cfg=told, default_cfg=told)  # one under two names, as timm has it
    return {"classes": data.classes, **images}


def _train(
    recipe: Recipe,
    data: Data,
    network: nn.Module,
    folder: Path,
    checkpoint: Path | None,
    objective: Objective,
    teaching: Teaching | None,
    progress: bool,
    callbacks: Sequence[Callback],
) -> Classification:
    """Run Lightning's Trainer to the end of the recipe."""
    own: list[Callback] = [Keep(folder, recipe.checkpoint_minutes)]
    if recipe.ema is not None:
        own.insert(0, WeightAveraging(multi_avg_fn=_ema(recipe.ema)))
    if progress:
        own.append(Bar())
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=recipe.epochs,
        accelerator=recipe.accelerator,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy=strategy_of(recipe),
        precision="bf16-mixed" if recipe.precision == "bf16" else "32-true",
        gradient_clip_val=recipe.clip,
        logger=_logger(folder),
        callbacks=[*own, *callbacks],
        plugins=[CheckpointFiles(), *environment_plugins()],
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # `Batches` gives each process its share
        log_every_n_steps=LOG_EVERY,
    )
    device = trainer.strategy.root_device
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
        if device.type == "cpu":
            warn_of_narrow_convolutions(network)
    train = data.batches("train", device)
    steps = train.steps(recipe.devices * recipe.nodes)  # further processes have not started yet
    task = Classification(
        network, recipe, classes=len(data.classes), steps=steps, objective=objective, teaching=teaching
    )
    parts: list[Any] = ["val", "check", *["test"] * recipe.test_each]  # in the order of `Classification`
    scored = [data.batches(part, device) for part in parts]
    for loader in (train, *scored):
        loader.unreadable = task.unreadable  # one set for all, kept in checkpoints
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, train, scored, ckpt_path=checkpoint)
    except OSError as error:
        clear = _clear(error, folder)
        if clear is error:
            raise
        raise clear from error
    except SIGTERMException as stop:  # uncaught, it would end the process with status 0
        raise Terminated(f"terminated; to continue the run in {folder}, {AGAIN}") from stop
    except SystemExit as stop:
        # Lightning turns Ctrl-C into this, and leaves the process deaf to the next Ctrl-C.
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt(f"interrupted; to continue the run in {folder}, {AGAIN}") from stop
    return task


def _finish(
    recipe: Recipe,
    data: Data,
    network: nn.Module,
    folder: Path,
    task: Classification,
    about: dict[str, Any],
) -> Run:
    """Save and test the best network, and write the result."""
    history, best = task.history, task.best["epoch"]
    unreadable = set(task.unreadable)
    test_accuracy = None
    if data.test is not None:
        device = task.trainer.strategy.root_device
        loader = data.batches("test", device)
        torch.manual_seed(mixed_seed(recipe.seed, place()[0], "test"))  # a network may draw
        test_accuracy = score(network, loader, data.classes, device=device).top1
        network.cpu()
        unreadable |= loader.unreadable
    unreadable = set().union(*gathered(unreadable))
    run = Run(
        folder=folder,
        recipe=recipe,
        model=network,
        history=history,
        best_epoch=best,
        val_accuracy=history[best]["val_accuracy"],
        test_accuracy=test_accuracy,
        seconds=sum(row["seconds"] for row in history),
        unreadable=len(unreadable),
        unreadable_paths=tuple(sorted(unreadable)),
    )
    if _first():
        with writing(folder / BEST, ADVICE):
            save(network, folder / BEST, **about)
        write_run(run)
    if unreadable:
        logging.getLogger(__name__).warning(
            "%d images could not be read, such as %s; %s names them",
            len(unreadable), run.unreadable_paths[0], folder / RESULT,
        )  # fmt: skip
    return run


def _clear(error: OSError, folder: Path) -> OSError:
    """An error that names the file, for one of our own or for a full disk that TensorBoard met.

    Lightning closes its loggers after an error; on a full disk that raises a second error.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, NotWrittenError):
            return found
        found = found.__context__
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return error
    told = NotWrittenError(f"{folder} cannot be written ({error.strerror}); {ADVICE}")
    told.errno = error.errno
    return told


def _logger(folder: Path) -> Any:
    """TensorBoard's logger, into the run's folder; False where it is not installed."""
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name=TENSORBOARD, version="")
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning(
            "TensorBoard is not installed, so only %s is written; pip install tensorboard to have both",
            METRICS,
        )
        return False


def _ema(decay: float) -> Any:
    """Moving average whose decay rises from 0.1 to `decay`, so that the first steps are forgotten.

    It takes all values of one type at once, as torch's own averages do. Integers are copied.
    """

    def average(old: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        # As in TensorFlow's ExponentialMovingAverage with num_updates.
        share = min(decay, (1 + float(count)) / (10 + float(count)))
        if not old[0].is_floating_point():  # counters and indices have no mean
            torch._foreach_copy_(old, new)
            return
        torch._foreach_mul_(old, share)
        torch._foreach_add_(old, torch._foreach_mul(new, 1 - share))

    return average


def _first() -> bool:
    """Whether this is the process that writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _claimed(folder: Path, recipe: Recipe, resume: bool) -> AbstractContextManager[Path | None]:
    """Hold the folder (in the first process, for all) and give the checkpoint to continue from."""
    if _first():
        return claimed(folder, recipe, resume=resume)
    return nullcontext(newest(folder, quiet=True) if resume else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes on its products and on choices that are made here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
