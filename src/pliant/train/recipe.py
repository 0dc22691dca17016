"""What a training run is: `Recipe`, and how ``key=value`` strings change one.

Nothing heavy is imported here, so recipes are listed and changed at once.
"""

from __future__ import annotations

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

PLAIN_TEACHER = "plain"  # the teacher that is the recipe's own network before its conversion

# These may change between a run and its continuation, because they say where it runs rather than what
# is run. A run that stopped at an unreadable image may go on without that image. A teacher is known by
# the hash of its weights.
WHERE = (
    *("note", "path", "download", "workers", "threads", "accelerator", "strategy"),
    *("unreadable", "checkpoint_minutes", "teacher_weights"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, complete: network, data, optimisation, and where it runs.

    Args:
        name: name of the run; its default folder is ``runs/<name>-s<seed>``.
        model: a network that ``timm.create_model`` knows.
        model_args: keyword arguments of the network (``{"c": 16}``), plain values only. The number
            of classes comes from the data, and so does ``in_chans`` unless it is given.
        weights: weights to start from instead of random ones: a folder that `pliant.save` or `fit`
            wrote, or a file of a state dict. Converted networks also start from weights of their
            plain network (`pliant.train.weights.load_weights`).
        teacher: a frozen network to learn from: ``"plain"`` (this network before its conversion,
            with `weights`), the name of a network that ``timm.create_model`` knows, or None.
        teacher_args: keyword arguments of a named teacher.
        teacher_weights: weights of the teacher, as for `weights`. The teacher ``"plain"`` has
            `weights` unless this is given.
        distill_args: options of `pliant.train.distillation.Distillation`, such as
            ``{"alpha": 0.9, "temperature": 4.0}``.
        note: source of the recipe, and where the recipe departs from it.
        data: ``"digits"`` (8 x 8 images shipped by scikit-learn), ``"cifar10"``, ``"cifar100"``,
            ``"folder"`` (one folder a class, or ``train/`` and ``val/`` that hold such folders),
            ``"imagenet"`` (``train/`` and ``val/``), ``"shards"`` (tar files in webdataset's format).
        path: folder of the data, for all but digits. For shards also a pattern such as
            ``"data/{train,val}-*.tar"`` (`pliant.train.shards.find_shards`).
        download: let torchvision download CIFAR into `path`.
        pixels: height and width of the network's input.
        resize: in evaluation, the short side of an image from a file before its centre is cropped.
            None: 8/7 of `pixels` (256 for 224). Digits and CIFAR are resized to `pixels` whole. Where
            `override` changes `pixels`, this follows in proportion, unless it is changed, too.
        mean_std: mean and standard deviation for the normalisation: ``"data"`` (those of the data
            set), or those that pretrained weights expect, by timm's names: ``"imagenet"``,
            ``"inception"`` (0.5 throughout), ``"clip"``.
        val_fraction: share of the training images held out for validation, stratified; ``val/`` (or
            ``test/``) is then the test set. None: ``val/`` validates, and ``test/`` is the test set
            if there is one. Digits and CIFAR need a fraction.
        test_fraction: share held out as the test set, of a folder without ``train/``.
        split_seed: seed of these divisions. It is not `seed`, so that runs can be compared.
        epochs: passes over the training images.
        batch: images a step, on each device.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: highest learning rate.
        momentum: momentum of SGD, or first beta of AdamW.
        nesterov: use Nesterov momentum in SGD.
        weight_decay: weight decay of all parameters (see `decay_all`).
        decay_all: False leaves biases, norms and other vectors without weight decay.
        schedule: of the learning rate: ``"step"`` (times `gamma` every `step_size` epochs),
            ``"cosine"`` (to zero), ``"constant"``.
        step_size: epochs between two steps of the schedule ``"step"``.
        gamma: factor of such a step.
        warmup: epochs in which the learning rate rises linearly, before the schedule applies.
        clip: largest norm of the gradient; None: no clipping.
        objective: what is minimised: ``"cross_entropy"``, or the objective that a method brings
            (`pliant.train.objectives.objectives` lists all); for an adaptive network
            ``"specialize"`` or ``"joint"``.
        objective_args: options of the objective, such as ``{"alpha": 0.7}``.
        smoothing: label smoothing, in [0, 1).
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off. With mixup on too, each takes half of the batches.
        augmentation: ``"none"``; ``"crop"`` (shifts by up to 1/8 of the side for digits and CIFAR,
            random resized crops for files); ``"flip_crop"`` (crops and horizontal flips); or a
            string of timm's auto-augment (``"rand-m9-mstd0.5-inc1"``, ``"augmix-m3-w3"``,
            ``"original"``), on top of ``"flip_crop"``.
        erasing: probability of random erasing.
        ema: decay of a moving average of the weights, which is then validated and saved; None: off.
        precision: ``"fp32"``, or ``"bf16"`` (autocast, weights in fp32).
        seed: seed of initial weights, order and augmentation.
        workers: processes that read images. Digits and CIFAR use them only with auto-augment.
        threads: threads of torch on the CPU; None leaves them as they are.
        channels_last: use the channels_last memory format for network and images.
        accelerator: ``"cpu"``, ``"gpu"``, or ``"auto"`` (a GPU where there is one).
        devices: devices on each machine.
        nodes: machines; torchrun or SLURM's srun starts the run on each.
        strategy: for several devices: ``"ddp"`` (also ``"auto"``), or ``"fsdp"``, which shares out
            gradients and optimiser state (`pliant.train.sharding`).
        unreadable: ``"skip"`` and count an image that cannot be read, or ``"stop"`` at it.
        test_each: also score the test images after every epoch, as ``test_accuracy`` of the history.
            Nothing is chosen by it.
        checkpoint_minutes: minutes between checkpoints within an epoch, which is what a kill costs
            at most; 0: after every step; None: only after each epoch. The result does not change.

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
        """Refuse options that are out of range, or contradict one another."""
        _options.check(self)
        if self.resize is not None and self.resize < self.pixels:
            raise ValueError(f"resize must be at least pixels = {self.pixels}, not {self.resize}")
        kind = self.augmentation.split("-")[0]
        if self.augmentation not in AUGMENTATIONS and kind not in AUTO_AUGMENTATIONS:
            raise ValueError(
                f"augmentation must be one of {', '.join(AUGMENTATIONS)}, or a string of timm's "
                f"auto-augment that starts with {', '.join(AUTO_AUGMENTATIONS)}; not {self.augmentation!r}"
            )
        if self.data != "digits" and self.path is None:
            raise ValueError(f"data={self.data} needs the folder of its images; give path=...")
        if self.download and self.data not in ("cifar10", "cifar100"):
            raise ValueError(f"data={self.data} cannot be downloaded, only CIFAR can; set download=false")
        if self.val_fraction is None and self.data not in ("folder", "imagenet", "shards"):
            raise ValueError(
                f"data={self.data} has no validation set of its own; set val_fraction, such as 0.1"
            )
        if self.warmup >= self.epochs and self.warmup > 0:
            raise ValueError(
                f"warmup={self.warmup} must be shorter than the run, which has epochs={self.epochs}"
            )
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise ValueError(
                f"batch must be even for mixup and CutMix, which pair images, not {self.batch}"
            )
        if self.strategy == "fsdp" and self.devices * self.nodes == 1:
            raise ValueError(
                "strategy=fsdp shares a network out over several devices; set devices=2 or more, or "
                "strategy=auto"
            )
        if self.strategy == "fsdp" and self.ema is not None:
            raise ValueError(
                f"ema={self.ema} averages whole weights, which strategy=fsdp has in shares; set "
                f"strategy=ddp or ema=none"
            )
        if self.strategy == "fsdp" and self.teacher is not None:
            raise ValueError("strategy=fsdp has not been tried with a teacher; set strategy=ddp")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov needs SGD with momentum, not optimizer={self.optimizer} with "
                f"momentum={self.momentum}; set nesterov=false"
            )
        make_objective(self.objective, self.objective_args, self.smoothing)
        make_distillation(self.distill_args)
        for name in ("model_args", "teacher_args"):
            if "checkpoint_path" in getattr(self, name):  # some versions of timm run what is in the file
                own = "weights" if name == "model_args" else "teacher_weights"
                raise ValueError(f"{name} must not hold 'checkpoint_path'; set {own}=... to the file")
            reserved = {"num_classes", "pretrained_cfg"} & getattr(self, name).keys()
            if reserved:
                raise ValueError(
                    f"{name} must not hold {reserved.pop()!r}, which the data decides; remove it"
                )
        self._agree_on_teacher()

    def _agree_on_teacher(self) -> None:
        if self.teacher is None:
            for name in ("teacher_args", "teacher_weights"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs a teacher; set teacher=..., or remove {name}")
        elif self.teacher == PLAIN_TEACHER:
            if self.teacher_args:
                raise ValueError(
                    "teacher=plain takes model_args; remove teacher_args, or name another teacher"
                )
            if self.weights is None and self.teacher_weights is None:
                raise ValueError(
                    "teacher=plain needs the weights of the network before its conversion; set weights=..."
                )
        elif self.teacher_weights is None:
            raise ValueError(
                f"teacher={self.teacher} needs trained weights; set teacher_weights to the folder of a "
                f"saved network or to a file of a state dict"
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
        _options.refuse_unknown(values, OPTIONS, "a recipe")
        for key in ("name", "model"):
            if key not in values:
                raise ValueError(f"a recipe needs {key}; the values given are {', '.join(values)}")
        return cls(**values)


OPTIONS = tuple(f.name for f in fields(Recipe))


def override(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """A copy of `recipe` with some options changed by ``key=value`` strings.

    A value is read as the type of its option: ``none`` where that is allowed, ``true`` or ``false``
    for a switch. ``model_args.KEY=VALUE`` sets one argument of the network; ``objective_args``,
    ``teacher_args`` and ``distill_args`` are set in the same way. Their values are read as Python
    would (``16``, ``0.5``, ``(16, 32)``, ``true``), else as text.

    Raises:
        ValueError: no ``=``; an unknown option (close matches are listed); a value of
            the wrong type; or one that `Recipe` refuses.

    Example:
        >>> recipe = Recipe(name="mine", model="resnet20_cifar")
        >>> changed = override(recipe, ["epochs=5", "clip=1", "model_args.c=16"])
        >>> changed.epochs, changed.clip, changed.model_args
        (5, 1.0, {'c': 16})
        >>> override(replace(recipe, pixels=224, resize=256), ["pixels=112"]).resize
        128
    """
    texts: dict[str, str] = {}
    mappings: dict[str, Any] = {name: dict(getattr(recipe, name)) for name in _MAPPINGS}
    for change in changes:
        key, equals, text = change.partition("=")
        key, text = key.strip(), text.strip()
        if not equals:
            raise ValueError(f"{change!r} is not of the form key=value, such as epochs=5")
        head, dot, argument = key.partition(".")
        _options.refuse_unknown([head], OPTIONS, "a recipe")
        if head in mappings:
            if not dot or not argument:
                raise ValueError(f"{head} takes one argument at a time, such as {_MAPPINGS[head]}")
            mappings[head][argument] = _options.literal(text)
        elif dot:
            raise ValueError(f"{head} takes no argument {argument!r}; write {head}=...")
        else:
            texts[key] = text
    changed = _options.parse(Recipe, texts)
    if "pixels" in changed and recipe.resize is not None:
        changed.setdefault("resize", round(recipe.resize * changed["pixels"] / recipe.pixels))
    return replace(recipe, **changed, **mappings)


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
