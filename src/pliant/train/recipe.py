"""What a training run is: `Recipe`, and how ``key=value`` strings change one.

Nothing heavy is imported here, so recipes are listed and changed at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from pliant import _options
from pliant._options import Arguments, Count, NotNegative, PathText, Positive, Probability, Text, Whole
from pliant.train.distillation import make_distillation
from pliant.train.objectives import make_objective

DataName = Literal["digits", "cifar10", "cifar100", "folder", "imagenet", "shards"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["step", "cosine", "constant"]
Precision = Literal["fp32", "bf16"]
Accelerator = Literal["auto", "cpu", "gpu"]
OnUnreadable = Literal["skip", "stop"]
MeanStd = Literal["data", "imagenet", "inception", "clip"]
Strategy = Literal["auto", "ddp", "fsdp"]
Share = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

AUGMENTATIONS = ("none", "crop", "flip_crop")
# The starts of timm's configuration strings, each with its own options after a dash.
AUTO_AUGMENTATIONS = ("rand", "original", "originalr", "v0", "v0r", "3a", "augmix")

PLAIN = "plain"  # the teacher that is the network itself, before its conversion

# May differ between a run and its continuation: not what is run, but where. A run that
# stopped at an unreadable image may go on without it. A teacher is known by its weights' hash.
WHERE = (
    *("note", "path", "download", "workers", "threads", "accelerator", "strategy"),
    *("unreadable", "checkpoint_minutes", "teacher_weights"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, complete: network, data, optimisation, and where it runs.

    Args:
        name: what the run is called; its default folder is ``runs/<name>-s<seed>``.
        model: a network that ``timm.create_model`` knows.
        model_args: its keyword arguments (``{"c": 16}``), plain values only. The number
            of classes comes from the data, and so does ``in_chans`` unless given.
        weights: where the network starts instead of at random: a folder that
            `pliant.save` or `fit` wrote, or a file of a state dict. Weights of the plain
            network start its converted forms too (`pliant.train.weights.load_weights`).
        teacher: a frozen network that is learned from: ``"plain"``, this network before its
            conversion, with `weights`; or one that ``timm.create_model`` knows; None: none.
        teacher_args: keyword arguments of the latter.
        teacher_weights: its weights, as for `weights`; of ``"plain"`` `weights` unless given.
        distill_args: how it is learned from, ``{"alpha": 0.9, "temperature": 4.0}``: see
            `pliant.train.distillation.Distillation`.
        note: where the recipe comes from, and what in it is not its source's.
        data: ``"digits"`` (8 x 8 images shipped by scikit-learn), ``"cifar10"``,
            ``"cifar100"``, ``"folder"`` (one folder a class, or ``train/`` and ``val/``
            that hold such folders), ``"imagenet"`` (the latter, with ``val/``), ``"shards"``
            (tar files in webdataset's format).
        path: folder of the data; digits need none. Of shards also a pattern:
            ``"data/{train,val}-*.tar"`` (`pliant.train.shards.find_shards`).
        download: let torchvision download CIFAR into `path`.
        pixels: height and width of the network's input.
        resize: short side that an image from a folder is resized to before the central
            crop of evaluation; None: 8/7 of `pixels` (256 for 224). Digits and CIFAR are
            resized to `pixels` whole.
        mean_std: mean and standard deviation that images are normalised by: ``"data"``, the
            data set's; or what a network that gives `weights` was trained with, as timm names
            it: ``"imagenet"``, ``"inception"`` (0.5 throughout), ``"clip"``.
        val_fraction: share of the training images held out for validation, stratified.
            None: the ``val/`` folder (or shards) validates, and nothing is tested unless there is a
            ``test/``. With a fraction, ``val/`` (or ``test/``) is the test set. For
            digits and CIFAR a fraction is needed.
        test_fraction: share of the images of a folder without ``train/`` that are held
            out as the test set.
        split_seed: of these divisions; not `seed`, so that runs can be compared.
        epochs: passes over the training images.
        batch: images a step, on each device.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: learning rate at its highest.
        momentum: of SGD; first beta of AdamW.
        nesterov: Nesterov's form of SGD.
        weight_decay: on every parameter, unless `decay_all` is off.
        decay_all: off: no weight decay on biases, norms and other vectors.
        schedule: ``"step"`` (times `gamma` every `step_size` epochs), ``"cosine"`` (to
            zero), ``"constant"``.
        step_size: in epochs.
        gamma: see `schedule`.
        warmup: epochs in which the rate rises linearly, before the schedule applies.
        clip: largest norm of the gradient; None: no clipping.
        objective: what is minimised: ``"cross_entropy"``, or the objective that a method brings
            (`pliant.train.objectives.objectives` lists all); for an adaptive network
            ``"specialize"`` or ``"joint"``.
        objective_args: options of the objective, such as ``{"alpha": 0.7}``.
        smoothing: of labels, in [0, 1).
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off. With both, each takes half of the batches.
        augmentation: ``"none"``; ``"crop"``: shifts by up to 1/8 of the side for digits
            and CIFAR, random resized crops for folders; ``"flip_crop"``: and horizontal
            flips; or a string of timm's auto-augment (``"rand-m9-mstd0.5-inc1"``,
            ``"augmix-m3-w3"``, ``"original"``), on top of ``"flip_crop"``.
        erasing: probability of random erasing.
        ema: decay of the moving average of the weights, which is then what is validated
            and saved; None: off.
        precision: ``"fp32"``, or ``"bf16"`` by autocast, weights in fp32.
        seed: of initial weights, order and augmentation.
        workers: processes that read images; digits and CIFAR use none, unless
            `augmentation` is one of timm's strings.
        threads: of torch on the CPU; None leaves them as they are.
        channels_last: memory format of network and images.
        accelerator: ``"auto"`` takes a GPU where there is one.
        devices: how many, on each machine.
        nodes: machines; torchrun or SLURM's srun starts the run on each.
        strategy: of several devices: ``"ddp"``, which ``"auto"`` means; or ``"fsdp"``, which shares
            gradients and optimiser out (`pliant.train.sharding`).
        unreadable: ``"skip"`` an image that cannot be read, and count it, or ``"stop"``.
        test_each: score the test images after every epoch too, for a report: nothing is chosen
            by it. ``test_accuracy`` of the history.
        checkpoint_minutes: between checkpoints within an epoch, so what a kill costs at most;
            0: after every step; None: only after each epoch. It does not change the result.

    Raises:
        ValueError: an option is out of its range or contradicts another.

    Example:
        >>> recipe = Recipe(name="mine", model="resnet20_cifar", epochs=3, lr=0.1)
        >>> override(recipe, ["epochs=5", "model_args.drop_rate=0.1"]).model_args
        {'drop_rate': 0.1}
    """

    name: Text
    model: Text
    model_args: Arguments = field(default_factory=dict)
    weights: PathText | None = None
    teacher: str | None = None
    teacher_args: Arguments = field(default_factory=dict)
    teacher_weights: PathText | None = None
    distill_args: Arguments = field(default_factory=dict)
    note: str = ""
    data: DataName = "digits"
    path: PathText | None = None
    download: bool = False
    pixels: Count = 32
    resize: Count | None = None
    mean_std: MeanStd = "data"
    val_fraction: Fraction | None = 0.1
    test_fraction: Share = 0.1
    split_seed: Whole = 0
    epochs: Count = 10
    batch: Count = 64
    optimizer: Optimizer = "sgd"
    lr: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    decay_all: bool = True
    schedule: Schedule = "cosine"
    step_size: Count = 30
    gamma: Positive = 0.1
    warmup: NotNegative = 0.0
    clip: Positive | None = None
    objective: str = "cross_entropy"
    objective_args: Arguments = field(default_factory=dict)
    smoothing: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    augmentation: str = "none"
    erasing: Probability = 0.0
    ema: Fraction | None = None
    precision: Precision = "fp32"
    seed: Whole = 0
    workers: Whole = 2
    threads: Count | None = None
    channels_last: bool = False
    accelerator: Accelerator = "auto"
    devices: Count = 1
    nodes: Count = 1
    strategy: Strategy = "auto"
    unreadable: OnUnreadable = "skip"
    test_each: bool = False
    checkpoint_minutes: NotNegative | None = 5.0

    def __post_init__(self) -> None:
        _options.check(self)
        self._agree()

    def _agree(self) -> None:
        """Refuse options that contradict one another."""
        if self.resize is not None and self.resize < self.pixels:
            raise ValueError(f"resize must be at least pixels = {self.pixels}, not {self.resize}")
        kind = self.augmentation.split("-")[0]
        if self.augmentation not in AUGMENTATIONS and kind not in AUTO_AUGMENTATIONS:
            raise ValueError(
                f"augmentation must be one of {', '.join(AUGMENTATIONS)}, or a string of timm's "
                f"auto-augment that starts with {', '.join(AUTO_AUGMENTATIONS)}; not {self.augmentation!r}"
            )
        if self.data != "digits" and self.path is None:
            raise ValueError(f"data = {self.data!r} lies in a folder: give its path (path=...)")
        if self.download and self.data not in ("cifar10", "cifar100"):
            raise ValueError(f"download is for CIFAR; {self.data!r} cannot be downloaded")
        if self.val_fraction is None and self.data not in ("folder", "imagenet", "shards"):
            raise ValueError(
                f"{self.data} has no validation set of its own: val_fraction must be a number, such as 0.1"
            )
        if self.warmup >= self.epochs and self.warmup > 0:
            raise ValueError(
                f"warmup = {self.warmup} leaves nothing of {self.epochs} epochs; make it shorter"
            )
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise ValueError(f"mixup and CutMix pair images: batch must be even, not {self.batch}")
        if self.strategy == "fsdp" and self.devices * self.nodes == 1:
            raise ValueError(
                "strategy=fsdp shares a network out over several devices: set devices, or use auto"
            )
        if self.strategy == "fsdp" and self.ema is not None:
            raise ValueError(
                "ema averages whole weights, which strategy=fsdp has in shares: use ddp, or ema=none"
            )
        if self.strategy == "fsdp" and self.teacher is not None:
            raise ValueError("a teacher has not been tried beside shares of a student: use strategy=ddp")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov belongs to SGD with momentum; turn it off")
        make_objective(self.objective, self.objective_args, self.smoothing)
        make_distillation(self.distill_args)
        for name in ("model_args", "teacher_args"):
            reserved = {"num_classes", "pretrained_cfg"} & getattr(self, name).keys()
            if reserved:
                raise ValueError(f"{name} holds {reserved.pop()!r}, which the data decides; leave it out")
        self._agree_on_teacher()

    def _agree_on_teacher(self) -> None:
        if self.teacher is None:
            for name in ("teacher_args", "teacher_weights"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of a teacher, and there is none: give teacher, or drop it")
        elif self.teacher == PLAIN:
            if self.teacher_args:
                raise ValueError("teacher_args are of a network by name; the plain one has model_args")
            if self.weights is None and self.teacher_weights is None:
                raise ValueError(
                    "teacher='plain' is the network of `weights` before its conversion: give weights"
                )
        elif self.teacher_weights is None:
            raise ValueError(
                f"teacher={self.teacher!r} has to have learned something: give teacher_weights, a saved "
                f"network's folder or a file of a state dict"
            )

    @property
    def in_chans(self) -> int:
        """Channels of the images: 1 for digits, else 3, unless `model_args` says."""
        return int(self.model_args.get("in_chans", 1 if self.data == "digits" else 3))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values.

        Raises:
            ValueError: an unknown key, one without default missing, or a wrong value.
        """
        for key in values:
            _known(key)
        for key in ("name", "model"):
            if key not in values:
                raise ValueError(f"a recipe needs {key}; these values have only {', '.join(values)}")
        return cls(**values)


def override(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """A copy of `recipe` with some options changed by ``key=value`` strings.

    Each value is read as the type of its option: ``none`` where that is allowed,
    ``true`` or ``false`` for a switch. ``model_args.KEY=VALUE`` sets one argument of the
    network, ``objective_args.KEY=VALUE`` one option of the objective (likewise ``teacher_args``
    and ``distill_args``); the value is read as Python would (``16``, ``0.5``, ``(16, 32)``,
    ``true``), else as a string.

    Raises:
        ValueError: no ``=``; an unknown option (close matches are listed); a value of
            the wrong type; or one that `Recipe` refuses.

    Example:
        >>> recipe = Recipe(name="mine", model="resnet20_cifar")
        >>> changed = override(recipe, ["epochs=5", "clip=1", "model_args.c=16"])
        >>> changed.epochs, changed.clip, changed.model_args
        (5, 1.0, {'c': 16})
    """
    texts: dict[str, str] = {}
    mappings: dict[str, Any] = {name: dict(getattr(recipe, name)) for name in _MAPPINGS}
    for change in changes:
        key, equals, text = change.partition("=")
        key, text = key.strip(), text.strip()
        if not equals:
            raise ValueError(f"{change!r} is not of the form key=value, such as epochs=5")
        head, dot, argument = key.partition(".")
        _known(head)
        if head in mappings:
            if not dot or not argument:
                raise ValueError(f"{head} is set one by one: {_MAPPINGS[head]}")
            mappings[head][argument] = _options.literal(text)
        elif dot:
            raise ValueError(f"{head} has no part {argument!r}; write {head}=...")
        else:
            texts[key] = text
    return replace(recipe, **_options.parse(Recipe, texts), **mappings)


# Options with parts, and how one is set.
_MAPPINGS = {
    "model_args": "model_args.c=16",
    "teacher_args": "teacher_args.c=16",
    "distill_args": "distill_args.alpha=0.5",
    "objective_args": "objective_args.alpha=0.5",
}


def differences(a: Recipe, b: Recipe, *, leaving_out: Iterable[str] = ()) -> list[str]:
    """What differs between two recipes, as ``"epochs (5 and 10)"``."""
    one, two = a.as_dict(), b.as_dict()
    return [
        f"{k} ({one[k]!r} and {two[k]!r})" for k in one if one[k] != two[k] and k not in set(leaving_out)
    ]


def _known(key: str) -> None:
    names = [f.name for f in fields(Recipe)]
    if key not in names:
        close = difflib.get_close_matches(key, names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}"
        raise ValueError(f"a recipe has no option {key!r}; {hint}")
