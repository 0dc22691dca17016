"""Images that calibrate: which of them set ranges, which are compared on, and what is refused."""

from __future__ import annotations

import pytest
import torch

import _images
from pliant.deploy.calibration import calibration, in_batches, in_whole_batches
from pliant.deploy.inputs import Preparation
from pliant.train.images import TensorImages

SIZE = (3, 6, 8)
NORMALISED = Preparation("normalised", SIZE, SIZE, (0.5,), (0.25,))
BYTES = Preparation("uint8", SIZE, SIZE, (0.5,), (0.25,))


def numbered(count: int) -> torch.Tensor:
    """Images that tell their number, in their first value."""
    images = torch.rand(count, *SIZE)
    images[:, 0, 0, 0] = torch.arange(count)
    return images


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


def test_every_second_image_of_batches_is_compared_on():
    labelled = ((x, torch.zeros(len(x))) for x in numbered(30).split(4))
    for given in (numbered(30), list(numbered(30).split(4)), labelled):
        setting, others = calibration(given, NORMALISED, 5)
        assert numbers(setting) == [0, 2, 4, 6, 8]
        assert numbers(others) == [1, 3, 5, 7, 9]


def test_no_more_batches_are_asked_for_than_needed():
    def batches():
        yield numbered(4)
        raise AssertionError("one too many")

    assert len(calibration(batches(), NORMALISED, 2)[0]) == 2


def test_images_of_a_folder_are_of_all_classes_and_prepared(tmp_path):
    folder = _images.make_folder(tmp_path / "photos", per_class=8)
    setting, others = calibration(folder, NORMALISED, 3)
    assert setting.shape == others.shape == (3, *SIZE)
    strongest = torch.cat([setting, others]).mean((2, 3)).argmax(1)
    assert sorted(strongest.tolist()) == [0, 0, 1, 1, 2, 2]  # red, green and blue
    as_bytes = torch.cat(calibration(str(folder), BYTES, 3))
    assert as_bytes.dtype == torch.uint8
    as_floats = torch.cat([setting, others]) * 0.25 + 0.5
    torch.testing.assert_close(as_bytes / 255, as_floats, atol=1e-5, rtol=0)


def test_with_a_folder_to_check_on_all_images_set_ranges(tmp_path):
    _images.make_folder(tmp_path, per_class=2)
    setting, others = calibration(numbered(9), NORMALISED, 7, tmp_path)
    assert numbers(setting) == [0, 1, 2, 3, 4, 5, 6]
    assert len(others) == 7


def test_a_set_of_images_is_read_all_over():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, *SIZE).clone()
    images[:, :, 0, 1] = 99
    setting, others = calibration(TensorImages(images, torch.zeros(10)), BYTES, 2)
    assert numbers(setting) == [0, 5]
    assert numbers(others) == [2, 7]


def test_batches_to_calibrate_and_to_check_with():
    assert [numbers(x) for x in in_batches(numbered(7), (1, 3))] == [[0], [1, 2, 3], [4], [5, 6]]
    assert [numbers(x) for x in in_whole_batches(numbered(5), 3)] == [[0, 1, 2], [3, 4, 0]]


BAD = numbered(4)
BAD[2, 1, 3, 3] = float("nan")


@pytest.mark.parametrize(
    ("given", "preparation", "message"),
    [
        (None, NORMALISED, "needs calibrate=: some hundred images"),
        (3, NORMALISED, "must be a folder, a set of images or batches of them, not a int"),
        ("no/such", NORMALISED, "no/such is no folder of images to calibrate with"),
        ([], NORMALISED, "calibrate holds 0 images; give at least 2"),
        (numbered(1), NORMALISED, "calibrate holds 1 images"),
        (["a.png"], NORMALISED, "as the file takes them, not a str"),
        (numbered(4), BYTES, r"torch.uint8 images of \[any, 3, 6, 8\].*not torch.float32"),
        (torch.rand(4, 3, 8, 6), NORMALISED, r"of \[any, 3, 6, 8\].*of \[4, 3, 8, 6\]"),
        (BAD, NORMALISED, "image 2 of calibrate holds NaN or infinity; remove it"),
        (torch.full((4, *SIZE), 0.5), NORMALISED, "the 4 images of calibrate have no spread"),
    ],
)
def test_images_that_set_no_ranges_are_refused(given, preparation, message):
    with pytest.raises(ValueError, match=message):
        calibration(given, preparation, 8)


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_count_that_is_none(count):
    with pytest.raises(ValueError, match="calibrate_images must be a whole number from 1, not"):
        calibration(numbered(4), NORMALISED, count)


def test_a_damaged_image_is_named(tmp_path):
    folder = _images.make_folder(tmp_path, per_class=1)
    _images.damage(folder / "red" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png, an image to calibrate with, cannot be read.*remove it"):
        calibration(folder, NORMALISED, 8)
