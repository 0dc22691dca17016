"""The networks of a run: the one to train, before its first step, and its teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from torch import nn

from pliant.models._build import check_network, plain_form
from pliant.train.data import Data
from pliant.train.distillation import Teaching, make_distillation
from pliant.train.recipe import PLAIN_TEACHER, Recipe
from pliant.train.weights import load_weights


def build(recipe: Recipe, classes: int, role: Literal["model", "teacher"] = "model") -> nn.Module:
    """The recipe's network or teacher for a number of classes, with fresh weights.

    Raises:
        ValueError: timm has no such network, or it takes no such arguments.
    """
    name, arguments = getattr(recipe, role), getattr(recipe, f"{role}_args")
    check_network(name)
    try:
        network: nn.Module = timm.create_model(name, **_arguments(arguments, recipe, classes))
    except TypeError as error:
        raise ValueError(f"{name} does not take {role}_args = {dict(arguments)}: {error}") from error
    return network


def begun(recipe: Recipe, data: Data, model: nn.Module | None = None, *, weights: bool = True) -> nn.Module:
    """The network of a run before its first step.

    Args:
        recipe: names the network and its weights.
        data: images to train on.
        model: this network instead of a new one.
        weights: load the recipe's weights, if it has any.

    Raises:
        ValueError: as `build` and `pliant.train.weights.load_weights`; the network given is not in
            float32.
        FileNotFoundError: the weights are not there.
    """
    network = build(recipe, len(data.classes)) if model is None else model
    half = {p.dtype for p in network.parameters() if p.is_floating_point()} - {torch.float32}
    if half:
        raise ValueError(
            f"the network has weights in {half.pop()}, and training keeps them in float32; give "
            f"model.float(), and set precision=bf16 to compute in bfloat16"
        )
    if weights and recipe.weights is not None:
        _load(network, recipe.weights, data)
    return network


def before_conversion(recipe: Recipe, data: Data) -> nn.Module:
    """The plain network of a recipe's converted network, with the weights that both start from.

    Raises:
        ValueError: the recipe has no weights, or they are not of this network.
        FileNotFoundError: the weights are not there.

    Example:
        >>> import tempfile
        >>> import pliant
        >>> from pliant.train.data import load_data
        >>> plain = timm.create_model("resnet20_cifar", in_chans=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights = pliant.save(plain, f"{folder}/net")
        ...     recipe = Recipe(name="a", model="resnet20_cifar_mod", weights=weights)
        ...     again = before_conversion(recipe, load_data(recipe))
        >>> bool((again.fc.weight == plain.fc.weight).all())
        True
    """
    own = recipe.teacher_weights if recipe.teacher == PLAIN_TEACHER else None
    place = own or recipe.weights
    if place is None:
        raise ValueError("the network before its conversion needs weights; set weights=... in the recipe")
    network, _ = plain_form(recipe.model, **_arguments(recipe.model_args, recipe, len(data.classes)))
    _load(network, place, data, new_classifier=False)
    return network


def teaching_of(
    recipe: Recipe, data: Data, network: nn.Module, teacher: nn.Module | None = None
) -> Teaching | None:
    """The teacher of a run, frozen and checked against its student; None without a teacher.

    Args:
        recipe: names the teacher and its weights.
        data: images to train on.
        network: the student.
        teacher: a network to copy, instead of the recipe's teacher.

    Raises:
        ValueError: there are two teachers, or options without a teacher; the weights are not the
            teacher's; or the network cannot learn from it (`Teaching.check`).
        FileNotFoundError: the weights are not there.
    """
    if teacher is not None and recipe.teacher is not None:
        raise ValueError(
            f"there are two teachers, teacher={recipe.teacher} and the network given; drop one"
        )
    if teacher is None and recipe.teacher is None:
        if recipe.distill_args:
            raise ValueError("distill_args needs a teacher; set teacher=..., or remove distill_args")
        return None
    if teacher is not None:
        config: Any = getattr(teacher, "pretrained_cfg", None) or {}
        chosen, name = copy.deepcopy(teacher), str(config.get("architecture") or type(teacher).__name__)
    elif recipe.teacher == PLAIN_TEACHER:
        chosen, name = before_conversion(recipe, data), f"{recipe.model} before its conversion"
    else:
        assert recipe.teacher is not None
        assert recipe.teacher_weights is not None  # `Recipe` sees to it
        name = recipe.teacher
        chosen = build(recipe, len(data.classes), "teacher")
        _load(chosen, recipe.teacher_weights, data, convert=False, new_classifier=False)
    teaching = Teaching(chosen, make_distillation(recipe.distill_args), name)
    teaching.check(network, (recipe.in_chans, recipe.pixels, recipe.pixels))
    return teaching


def _arguments(arguments: Mapping[str, Any], recipe: Recipe, classes: int) -> dict[str, Any]:
    return {"in_chans": recipe.in_chans, **arguments, "num_classes": classes}


def _load(network: nn.Module, place: str, data: Data, **options: bool) -> None:
    load_weights(network, place, classes=data.classes, mean=data.mean, std=data.std, **options)
