"""Which images a run trains, validates and tests on: recorded at its start, and held to afterwards.

A division that was derived again from the folder would be another one as soon as an image is added: images
that the run trained on would be scored.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pliant._config import some
from pliant.train.images import ImageSet

FILES = ("folder", "imagenet")  # kinds of data that are folders of images


@dataclass(frozen=True, kw_only=True)
class Division:
    """The images of a run by part and class, as ``images.json`` in its folder holds them.

    Attributes:
        data: kind of the data, as `Recipe.data`.
        path: the data's place, absolute and without links; None for data without one.
        classes: names, in the order of the labels.
        parts: for ``train``, ``val`` and ``test``, the names of the images of each class
            (`ImageSet.name`); without ``test`` where there are no test images.
    """

    data: str
    path: str | None
    classes: tuple[str, ...]
    parts: Mapping[str, Mapping[str, list[str]]]

    @classmethod
    def of(
        cls, sets: Mapping[str, ImageSet], classes: tuple[str, ...], data: str, path: str | None
    ) -> Division:
        """The division into `sets`, by part.

        Raises:
            ValueError: two images have one name.
        """
        parts: dict[str, dict[str, list[str]]] = {}
        for part, images in sets.items():
            named = parts[part] = {name: [] for name in classes}
            for i, label in enumerate(images.labels.tolist()):
                named[classes[label]].append(images.name(i))
            for name, times in Counter(chain(*named.values())).most_common(1):
                if times > 1:
                    raise ValueError(f"{times} images are called {name}; give each a name of its own")
        return cls(data=data, path=resolved(path), classes=classes, parts=parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Division:
        """A division from what `as_dict` gave."""
        return cls(**{**values, "classes": tuple(values["classes"])})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def lies_in(self, data: str, path: str | None) -> bool:
        """Whether a place holds the data of the run: the place itself, or one with all its images.

        So a folder that was moved is known again. Data without files is known by its kind.
        """
        both = {data, self.data}
        if both != {data} and not both <= {*FILES}:
            return False
        if data not in (*FILES, "shards") or resolved(path) == self.path:
            return True
        names = (name for named in self.parts.values() for inside in named.values() for name in inside)
        if data == "shards":
            names = (shard for shard in {f"{name.partition('.tar/')[0]}.tar" for name in names})
        return all(Path(path or "", name).is_file() for name in names)

    def hold(
        self, sets: Mapping[str, ImageSet], classes: tuple[str, ...], wanted: tuple[str, ...]
    ) -> dict[str, ImageSet]:
        """Find the images of some parts again.

        Images that were added since are left out; a warning names one.

        Args:
            sets: all images of the data, in the sets that it comes in.
            classes: names of the labels in `sets`.
            wanted: parts to find. Those that the run has none of are left out.

        Raises:
            ValueError: an image or a class of the run is missing, or is of another class now.
        """
        if missing := [name for name in self.classes if name not in classes]:
            raise ValueError(
                f"{self._data} has no class {some(missing)}, which the run began with; its classes are "
                f"{some(classes)} now. Name them as before, or start another run"
            )
        known = {
            name: (part, label)
            for part, named in self.parts.items()
            for label, one in enumerate(self.classes)
            for name in named.get(one, ())
        }
        held: dict[str, ImageSet] = {}
        added: list[str] = []
        for images in sets.values():
            chosen: dict[str, list[tuple[int, int]]] = {}
            others = []
            for i, now in enumerate(images.labels.tolist()):
                name = images.name(i)
                if name not in known:
                    others.append(name)
                    continue
                part, label = known[name]
                if classes[now] != self.classes[label]:
                    raise ValueError(
                        f"{name} of {self._data} is of class {classes[now]} now, and was of class "
                        f"{self.classes[label]} when the run began; mend it, or start another run"
                    )
                chosen.setdefault(part, []).append((i, label))
            for part, found in chosen.items():
                index, labels = torch.tensor(found).unbind(1)
                held[part] = images.subset(index)
                held[part].labels = labels
            if chosen:
                added += others
        for part in wanted:
            names = {name for name, (of, _) in known.items() if of == part}
            there = held.get(part, ())
            if len(there) < len(names):
                lost = names - {held[part].name(i) for i in range(len(there))}
                raise ValueError(
                    f"{self._data} has no longer {len(lost)} of the {len(names)} images that the run began "
                    f"with for {part}: {some(lost)}. Put them back, or start another run"
                )
        if added:
            logging.getLogger(__name__).warning(
                "%s has %d images that the run did not begin with, such as %s; they are left out",
                self._data, len(added), added[0],
            )  # fmt: skip
        return {part: held[part] for part in wanted if part in held}

    def trained_on(self, images: ImageSet, path: str | None) -> list[str]:
        """Names of those of some other images that the run trained on, as far as their names tell.

        Args:
            images: such as those of a folder inside the run's.
            path: their place.
        """
        names = {name for inside in self.parts["train"].values() for name in inside}
        places = {f"{self.path}/{name}" for name in names}
        here = resolved(path)
        return [
            name
            for i in range(len(images))
            if (name := images.name(i)) in names or f"{here}/{name}" in places
        ]

    @property
    def _data(self) -> str:
        return self.path or self.data


def resolved(path: str | None) -> str | None:
    """A path, absolute and without links; also of a pattern. None stays None.

    Example:
        >>> resolved("/data/../data/{train,val}-*.tar")
        '/data/{train,val}-*.tar'
    """
    return None if path is None else os.path.realpath(path)
