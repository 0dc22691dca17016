"""How many images a second are read, decoded and augmented: folders beside shards, in turn.

A GPU that waits for images is an expensive heater, so the time of a step has to be compared with the
rate of the loader (docs/imagenet.md does).

Shapes: images are decoded to [H, W, 3] bytes; ``train`` gives batches float32 [B, 3, S, S].
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from pliant import tables
from pliant._files import atomic_path
from pliant.measuring.latency import median, spread
from pliant.provenance import provenance
from pliant.records import Origin, write_records
from pliant.train.batches import make_batches
from pliant.train.data import load_part, normalisation
from pliant.train.images import ImageSet
from pliant.train.recipe import Recipe
from pliant.train.shard_writing import write_shards
from pliant.train.shards import find_shards, index_shards

if TYPE_CHECKING:
    from rich.console import Console

Work = Literal["decode", "train"]
SOURCES = ("folder", "shards")
PHOTOGRAPHS = "photographs of scikit-learn"
_BATCH = 16  # small, so that a few hundred images are enough for a steady state


@dataclass(frozen=True, kw_only=True)
class LoaderRate(Origin):
    """Images a second of one way to load them.

    Attributes:
        data: what images.
        images: of one round.
        kilobytes: of the median image, compressed, in 1000 bytes.
        megapixels: of the median image, decoded.
        source: ``folder`` or ``shards``.
        work: ``decode``: read and decode to RGB; ``train``: also a random resized crop to `pixels`,
            a flip, normalised, in batches.
        pixels: side of what ``train`` gives.
        workers: processes; 0: the main process alone.
        rounds: that were timed.
        images_per_s: median over rounds.
        iqr: its interquartile range.
        ratio: to the rate from the folder, within rounds; median.
        ratio_iqr: its spread.
        index_us: of shards: time to find an image and its class at the start, in microseconds; median.
    """

    data: str
    images: int
    kilobytes: float
    megapixels: float
    source: str
    work: str
    pixels: int
    workers: int
    rounds: int
    images_per_s: float
    iqr: float | None = None
    ratio: float = 1.0
    ratio_iqr: float | None = None
    index_us: float | None = None


def measure_loader(
    folder: str | os.PathLike[str] | None = None,
    *,
    workers: Sequence[int] = (0, 1, 2),
    works: Sequence[Work] = get_args(Work),
    pixels: int = 224,
    rounds: int = 9,
    images: int = 200,
) -> list[LoaderRate]:
    """Time ways to load the same images, all in turn in each round.

    The clock runs from the batch in which every worker has given one to the last, so that starting
    processes does not count. Files are in the system's cache after the first, untimed round: disks
    are not measured.

    Args:
        folder: of images, one folder a class; or ``val/``, else ``train/``, of one that holds these.
            None: crops of the two photographs that scikit-learn ships, as JPEG of 500 x 375.
        workers: numbers of processes.
        works: what is done with an image.
        pixels: side of what ``train`` gives.
        rounds: how often.
        images: at most so many, evenly taken from the folder.

    Raises:
        ValueError: too few images to time, or a number that makes no sense.
        FileNotFoundError: `folder` is none of images.

    Example:
        >>> rows = measure_loader(workers=(0,), works=("decode",), rounds=1, images=48)
        >>> [row.source for row in rows], rows[0].images_per_s > 0
        (['folder', 'shards'], True)
    """
    for name, number in (("rounds", rounds), ("pixels", pixels)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    for work in works:
        if work not in get_args(Work):
            raise ValueError(f"no work {work!r}; there are {', '.join(get_args(Work))}")
    if not workers or min(workers) < 0:
        raise ValueError(f"workers must be numbers from 0 on, not {list(workers)}")
    least = _BATCH * (2 * max(1, *workers) + 1)
    with tempfile.TemporaryDirectory() as place:
        chosen = Path(place, "images")
        if folder is None:
            _photographs(chosen, images)
        else:
            _links(Path(folder), chosen, images)
        write_shards(chosen, Path(place, "shards"), shuffle=False)
        paths = dict(zip(SOURCES, (chosen, Path(place, "shards")), strict=True))
        sets = {source: _set(source, path, pixels) for source, path in paths.items()}
        count = len(sets["folder"][0])
        if count < least:
            raise ValueError(
                f"{count} images are too few for {max(workers)} workers: at least {least} are needed"
            )
        ways = [(work, n, source) for work in works for n in workers for source in SOURCES]
        rates: dict[tuple[str, int, str], list[float]] = {way: [] for way in ways}
        indexing = []
        for done in range(rounds + 1):
            start = time.perf_counter()
            index_shards(find_shards(str(paths["shards"]))[""])
            indexing += [1e6 * (time.perf_counter() - start) / count] if done else []
            for work, n, source in ways:
                rate = _rate(*sets[source], work, n)
                if done:  # the first round warms up
                    rates[work, n, source].append(rate)
        sizes = [Path(p).stat().st_size for p in chosen.rglob("*") if p.is_file()]
        areas = [Image.open(p).size for p in chosen.rglob("*") if p.is_file()]
    shared: dict[str, Any] = {
        "data": PHOTOGRAPHS if folder is None else Path(folder).resolve().name,
        "images": count,
        "kilobytes": round(float(np.median(sizes)) / 1000, 1),
        "megapixels": round(float(np.median([w * h for w, h in areas])) / 1e6, 3),
        "pixels": pixels,
        "rounds": rounds,
        **provenance(),
    }
    return [
        LoaderRate(
            source=source,
            work=work,
            workers=n,
            images_per_s=median(rates[work, n, source]) or 0.0,
            iqr=spread(rates[work, n, source]),
            ratio=median(of_folder := _over(rates[work, n, source], rates[work, n, "folder"])) or 0.0,
            ratio_iqr=spread(of_folder),
            index_us=median(indexing) if source == "shards" else None,
            **shared,
        )
        for work, n, source in ways
    ]


def _over(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def _photographs(folder: Path, count: int) -> None:
    """Real JPEGs about as large as ImageNet's: crops of the photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count // 2):
            top, left = draw.integers(0, [photograph.shape[0] - 374, photograph.shape[1] - 499])
            crop = Image.fromarray(photograph[top : top + 375, left : left + 500])
            crop.save(folder / name / f"{i}.jpg", quality=90)


def _links(folder: Path, to: Path, count: int) -> None:
    """Links to evenly taken images of a folder, one folder a class."""
    from torchvision.datasets import ImageFolder

    inner = next((folder / name for name in ("val", "train") if (folder / name).is_dir()), folder)
    found = ImageFolder(str(inner))
    every = len(found.samples)
    taken = np.linspace(0, every - 1, min(count, every)).astype(int)
    for name in found.classes:
        (to / name).mkdir(parents=True)
    for path, label in (found.samples[i] for i in taken):
        (to / found.classes[label] / Path(path).name).symlink_to(Path(path).resolve())
    for name in found.classes:  # of which none was taken
        if not any((to / name).iterdir()):
            (to / name).rmdir()


def _set(source: str, path: Path, pixels: int) -> tuple[ImageSet, Recipe]:
    """All images of a folder or of shards, and a recipe that trains on them."""
    recipe = Recipe(
        name="loader",
        model="resnet50",
        data="folder" if source == "folder" else "shards",
        path=str(path),
        pixels=pixels,
        augmentation="flip_crop",
        batch=_BATCH,
        accelerator="cpu",
        unreadable="stop",
    )
    return load_part(recipe)[0], recipe


def _rate(images: ImageSet, recipe: Recipe, work: Work, workers: int) -> float:
    """Images a second, from when every worker has given a batch."""
    batches = _decoded(images, workers) if work == "decode" else _augmented(images, recipe, workers)
    start, counted, first = 0.0, 0, max(1, workers)
    for number, n in enumerate(batches, 1):
        if number > first:
            counted += n
        elif number == first:
            start = time.perf_counter()
    return counted / (time.perf_counter() - start)


def _augmented(images: ImageSet, recipe: Recipe, workers: int) -> Iterable[int]:
    """How many images each batch has, as training makes it."""
    recipe = replace(recipe, workers=workers)
    batches = make_batches(images, recipe, *normalisation(recipe), train=True)
    return (len(y) for _, y in batches)


class _Decoded(torch.utils.data.Dataset[int]):
    """Decodes an image, and says that it was one: pixels need not be moved for that."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, i: int) -> int:
        self.images.image(i).load()
        return 1


def _decoded(images: ImageSet, workers: int) -> Iterable[int]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    loader: Any = torch.utils.data.DataLoader(
        _Decoded(images),
        batch_sampler=[part.tolist() for part in torch.split(order, _BATCH) if len(part) == _BATCH],
        num_workers=workers,
    )
    return (len(batch) for batch in loader)


def rates_markdown(rows: Sequence[LoaderRate]) -> str:
    """Rows as a Markdown table, under a line of what was loaded where."""
    where = dict.fromkeys(
        f"{r.hardware} · {r.images} images, {r.data}: {r.kilobytes} kB and {r.megapixels} "
        f"megapixels in the median · to {r.pixels} pixels · {r.rounds} rounds · torch {r.torch} · commit "
        f"{r.short_commit} · measured {r.date[:10]}"
        for r in rows
    )
    indexed = next((r.index_us for r in rows if r.index_us is not None), None)
    note = "" if indexed is None else f" · shards indexed in {indexed:.0f} µs an image, at the start"
    lines = [
        (
            r.work,
            str(r.workers),
            r.source,
            tables.with_spread(r.images_per_s, r.iqr, 0),
            tables.with_spread(r.ratio, r.ratio_iqr, 2),
        )
        for r in rows
    ]
    headings = ("work", "workers", "source", "images a second", "over folder")
    table = tables.markdown(headings, lines, ("work", "source"))
    return "\n".join([*(f"{line}{note}" for line in where), "", table])


def run_loader_bench(
    path: str | os.PathLike[str] | None = None,
    results: str | Path = "results",
    quick: bool = False,
    *,
    console: Console | None = None,
) -> list[LoaderRate]:
    """Measure the loader; write ``loader-cpu.csv`` and ``.md`` into `results`.

    Args:
        path: folder of images; None: photographs that scikit-learn ships.
        results: folder of the files; made if missing. A rehearsal's are ``loader-cpu-quick.*``.
        quick: a rehearsal: one round, without workers.
        console: where rich prints the table.

    Raises:
        ValueError: as `measure_loader`.
        FileNotFoundError: as `measure_loader`.
    """
    from rich.console import Console

    options: dict[str, Any] = {"workers": (0,), "rounds": 1, "images": 64} if quick else {}
    rows = measure_loader(path, **options)
    stem = Path(results) / f"loader-cpu{'-quick' if quick else ''}"
    write_records(f"{stem}.csv", LoaderRate, rows)
    table = rates_markdown(rows)
    with atomic_path(f"{stem}.md") as temporary:
        temporary.write_text(f"# The loader\n\n{_PREFACE}\n\n{table}\n", encoding="utf-8")
    console = console or Console()
    console.print(table, markup=False)
    console.print(f"written: {stem}.csv, .md")
    return rows


_PREFACE = """\
Written by `python -m research bench --suite loader`, from the CSV file beside it. `decode`: read and
decoded to RGB; `train`: also a random resized crop, a flip, normalised, in batches. All ways are timed in
turn in each round, and ratios are taken within a round; files are in the system's cache, so no disk is
measured. Workers 0: the main process. In brackets: interquartile range over rounds."""
