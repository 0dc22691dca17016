"""Image files: values of more than 8 bits, and folders with links."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from _images import folder_recipe, make_folder
from pliant.image_files import decoded
from pliant.train.data import load_data
from pliant.train.images import part_folders

RAMP = np.arange(1024).reshape(32, 32)  # 1,024 grey levels


def levels(path, channels=1):
    return np.asarray(decoded(path, channels))


@pytest.mark.parametrize(
    ("name", "values", "options"),
    [
        ("a.png", (RAMP * 64).astype(np.uint16), {}),
        ("a.tif", (RAMP * 64).astype(np.uint16), {}),
        ("a.tif", (RAMP * 64).astype(">u2"), {}),
        ("a.pgm", (RAMP * 64).astype(np.uint16), {}),
        ("a.tif", (RAMP / 1024).astype(np.float32), {}),
        ("a.tiff", (RAMP / 1024).astype(np.float32), {"compression": "tiff_lzw"}),
    ],
    ids=["png", "tiff", "big-endian", "pgm", "float", "packed float"],
)
def test_values_of_more_than_8_bits_are_scaled(name, values, options, tmp_path):
    Image.fromarray(values).save(tmp_path / name, **options)
    found = levels(tmp_path / name)
    assert found.dtype == np.uint8
    assert len(np.unique(found)) == 256
    assert np.abs(found.astype(float) - RAMP / 1024 * 255).max() <= 0.51
    assert (levels(tmp_path / name, 3) == found[..., None]).all()


@pytest.mark.parametrize(
    "values",
    [RAMP.astype(np.int32), RAMP.astype(np.float32), np.full((8, 8), np.nan, np.float32)],
    ids=["32 bits", "float", "nan"],
)
def test_values_of_no_known_range_are_unreadable(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="have no known range"):
        decoded(tmp_path / "a.tif", 1)
    make_folder(tmp_path / "images")
    Image.fromarray(values).save(tmp_path / "images" / "red" / "odd.tif")
    data = load_data(folder_recipe(tmp_path / "images", val_fraction=0.5, test_fraction=0.0))
    unreadable = set()
    for part in ("train", "val"):
        batches = data.batches(part)
        list(batches)
        unreadable |= batches.unreadable
    assert unreadable == {str(tmp_path / "images" / "red" / "odd.tif")}


def test_8_bits_are_what_pillow_reads(tmp_path):
    rng = np.random.default_rng(0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert(mode)
        image.save(tmp_path / "a.tif")
        for channels, wanted in ((1, "L"), (3, "RGB")):
            assert decoded(tmp_path / "a.tif", channels).tobytes() == image.convert(wanted).tobytes()


def read(path):
    """Names of the images by class, after what `load_data` reads undivided."""
    data = load_data(folder_recipe(path, val_fraction=0.5, test_fraction=0.0))
    found = {}
    for images in (data.train, data.val):
        for i, label in enumerate(images.labels.tolist()):
            found.setdefault(data.classes[label], []).append(images.name(i))
    return {name: sorted(names) for name, names in found.items()}


LINKS = {
    "itself": [("self", "")],
    "itself, within a class": [("blue/self", "")],
    "parent": [("up", "..")],
    "parent, within a class": [("red/up", "..")],
    "two loops": [("blue/x", "red"), ("red/y", "blue")],
    "two to itself": [("blue/x", ""), ("red/y", "")],
    "a class in another": [("blue/0", "red")],
    "a file": [("blue/0-first.png", "blue/1.png")],
    "a file of another class": [("blue/0-first.png", "red/1.png")],
}


@pytest.mark.parametrize("name", LINKS)
def test_each_file_is_read_once_whatever_links_there_are(name, tmp_path, caplog):
    root = make_folder(tmp_path / "images", 4)
    plain = read(root)
    assert plain == {c: [f"{c}/{i}.png" for i in range(4)] for c in ("blue", "green", "red")}
    assert not caplog.records
    for link, target in LINKS[name]:
        (root / link).symlink_to(root / target)
    assert read(root) == plain
    link = root / LINKS[name][0][0]
    assert str(link) in caplog.text
    assert ("leads back to" in caplog.text) == (LINKS[name][0][1] in ("", ".."))


def test_links_to_files_elsewhere_are_followed(tmp_path):
    make_folder(tmp_path / "store", 4)
    for part, numbers in (("train", (0, 1, 2)), ("val", (2, 3))):
        for name in ("blue", "red"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in numbers:
                (tmp_path / "images" / part / name / f"{i}.png").symlink_to(
                    tmp_path / f"store/{name}/{i}.png"
                )
    (tmp_path / "link").symlink_to(tmp_path / "images")
    for root in (tmp_path / "images", tmp_path / "link"):
        data = load_data(folder_recipe(root, val_fraction=None))
        assert (len(data.train), len(data.val)) == (6, 2)  # an image in both parts counts in the first
    (tmp_path / "images" / "val" / "red" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"val must hold one .*; red has no image of its own"):
        load_data(folder_recipe(tmp_path / "images", val_fraction=None))


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Val"), ("training", "validation"), ("train", "valid"), ("TRAIN", "Validation")],
)
def test_parts_are_known_by_any_usual_name(train, val, tmp_path):
    make_folder(tmp_path / train, 3)
    make_folder(tmp_path / val, 2)
    data = load_data(folder_recipe(tmp_path, val_fraction=None))
    assert (data.classes, len(data.train), len(data.val)) == (("blue", "green", "red"), 9, 6)
    make_folder(tmp_path / "Testing", 1)
    assert len(load_data(folder_recipe(tmp_path, val_fraction=None)).test) == 3
    make_folder(tmp_path / ("val" if val != "val" else "valid"), 2)
    with pytest.raises(ValueError, match=rf"{val}.* are both images for val; merge them, or rename one"):
        load_data(folder_recipe(tmp_path, val_fraction=None))


def test_a_class_may_be_called_like_a_part(tmp_path):
    (make_folder(tmp_path) / "red").rename(tmp_path / "train")
    assert part_folders(tmp_path) == {"": tmp_path}
    assert load_data(folder_recipe(tmp_path)).classes == ("blue", "green", "train")
