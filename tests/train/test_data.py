"""Data: which images, in which order, augmented how; damaged files; evaluation."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from _images import all_of, damage, folder_recipe, make_folder
from pliant.checkpoint import read_config
from pliant.train import Recipe, evaluate, fit
from pliant.train.batches import FileBatches, TensorBatches, shifted, transform
from pliant.train.data import divide, load_data, load_part, normalisation
from pliant.train.images import TensorImages, UnreadableImageError
from pliant.train.seeds import seeded

DIGITS = Recipe(name="x", model="resnet20_cifar", pixels=8, batch=64)


def test_digits_are_divided_by_class_and_do_not_overlap():
    data = load_data(DIGITS)
    assert [len(s) for s in (data.train, data.val, data.test, data.check)] == [1131, 126, 540, 126]
    flat = [s.images.flatten(1).float() @ torch.arange(64.0) for s in (data.train, data.val, data.test)]
    assert sum(len(f) for f in flat) == 1797
    for images in (data.train, data.val, data.test):
        share = images.labels.bincount(minlength=10) / len(images)
        assert (share - 0.1).abs().max() < 0.02
    again = load_data(replace(DIGITS, seed=5))
    assert torch.equal(again.val.images, data.val.images)
    other = load_data(replace(DIGITS, split_seed=5))
    assert torch.equal(other.test.images, data.test.images)
    assert not torch.equal(other.val.images, data.val.images)


def test_digits_are_the_images_of_scikit_learn_normalised():
    from sklearn.datasets import load_digits

    data = load_data(DIGITS)
    digits = load_digits()
    raw = [(i * 255 / 16).round().astype(np.uint8).tobytes() for i in digits.data]
    known = dict(zip(raw, digits.target, strict=True))
    for image, label in zip(data.test.images[:50], data.test.labels[:50], strict=True):
        assert known[image.numpy().tobytes()] == label
    x, _ = all_of(data.batches("test"))
    torch.testing.assert_close(x, (data.test.images / 255 - 0.3053) / 0.3760, atol=1e-5, rtol=1e-5)
    colour = load_data(replace(DIGITS, pixels=12, model_args={"in_chans": 3}))
    assert colour.test.images.shape == (540, 3, 12, 12)
    assert len(colour.mean) == 3


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("data", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ],
)
def test_images_can_be_normalised_as_trained_weights_want_them(name, mean, std, tmp_path):
    recipe = Recipe(name="x", model="resnet20_cifar", data="cifar10", path="x", mean_std=name)
    assert normalisation(recipe) == (mean, std)
    digits = load_data(replace(DIGITS, mean_std=name, model_args={"in_chans": 3}))
    if name != "data":
        assert (digits.mean, digits.std) == (mean, std)
        x, _ = all_of(digits.batches("test"))
        assert float(x[:, 0].min()) == pytest.approx(-mean[0] / std[0])  # black
    with pytest.raises(ValueError, match="mean_std must be 'data', 'imagenet', 'inception' or 'clip'"):
        replace(DIGITS, mean_std="none")


def test_a_run_is_scored_with_its_own_mean_and_std(tmp_path):
    recipe = replace(DIGITS, mean_std="inception", epochs=1, accelerator="cpu")
    run = fit(recipe, tmp_path / "run", progress=False)
    assert read_config(tmp_path / "run" / "best").mean == (0.5,)
    for network in (tmp_path / "run", run.model):
        assert evaluate(network, "digits", device="cpu").top1 == pytest.approx(run.test_accuracy)


def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone():
    recipe = replace(DIGITS, augmentation="flip_crop", erasing=0.5)
    data = load_data(recipe)

    def epoch(n, recipe=recipe):
        batches = replace(data, recipe=recipe).batches("train")
        batches.set_epoch(n)
        torch.rand(7)  # nothing is drawn from the global generator
        return all_of(batches)

    assert all(torch.equal(a, b) for a, b in zip(epoch(3), epoch(3), strict=True))
    assert not torch.equal(epoch(3)[1], epoch(4)[1])
    assert not torch.equal(epoch(3)[1], epoch(3, replace(recipe, seed=1))[1])
    y = epoch(3)[1]
    assert len(y) == 1131 // 64 * 64
    plain = replace(recipe, erasing=0.0)
    # A smaller batch moves every image as before.
    a, b = epoch(3, plain), epoch(3, replace(plain, batch=8))
    assert torch.equal(a[0], b[0][: len(a[0])])


def test_without_augmentation_an_epoch_is_a_permutation():
    data = load_data(replace(DIGITS, batch=1131))
    x, y = all_of(data.batches("train"))
    assert torch.equal(y.bincount(), data.train.labels.bincount())
    assert torch.equal(x.sum((1, 2, 3)).sort().values, all_of_sums(data).sort().values)


def all_of_sums(data):
    mean, std = data.mean[0], data.std[0]
    return (data.train.images * (1 / (255 * torch.tensor(std))) - torch.tensor(mean) / std).sum((1, 2, 3))


def test_shifts_and_flips_against_a_loop():
    x = torch.rand(6, 3, 5, 7)
    rows, columns = torch.randint(-2, 3, (6,)), torch.randint(-2, 3, (6,))
    flip = torch.tensor([True, False] * 3)
    found = shifted(x, rows, columns, flip)
    for n in range(6):
        wide = torch.nn.functional.pad(x[n], (2, 2, 2, 2))
        r, c = 2 + int(rows[n]), 2 + int(columns[n])
        crop = wide[:, r : r + 5, c : c + 7]
        assert torch.equal(found[n], crop.flip(-1) if flip[n] else crop)


def test_small_sets_are_not_dropped_and_too_small_ones_refused():
    images = TensorImages(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1]))
    batches = TensorBatches(images, DIGITS, (0.5,), (0.5,), train=True)
    assert len(batches) == 1
    assert len(all_of(batches)[1]) == 5
    with pytest.raises(ValueError, match="5 images cannot be divided"):
        divide(images.subset(torch.tensor([0, 1, 3, 2, 0])), 0.3, 0)


@pytest.mark.parametrize(
    "name", ["none", "crop", "flip_crop", "rand-m9-mstd0.5", "original", "augmix-m3-w2"]
)
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "files"])
def test_transforms_give_the_size_and_repeat(name, memory, tmp_path):
    if memory:
        images = TensorImages(
            torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1])
        )
        recipe = Recipe(name="x", model="x", data="cifar10", path="x", augmentation=name, erasing=0.5)
    else:
        recipe = folder_recipe(
            make_folder(tmp_path / "a", 10), val_fraction=0.2, augmentation=name, erasing=0.5
        )
        images = load_data(recipe).train
    for train in (True, False):
        change = transform(images, recipe, (0.5,) * 3, (0.25,) * 3, train=train)
        found = []
        for _ in range(2):
            with seeded(7, "image"):
                found.append(change(images.image(0)))
        assert found[0].shape == (3, 32, 32)
        assert torch.equal(*found)


@pytest.mark.parametrize("augmentation", ["flip_crop", "rand-m9-mstd0.5-inc1"])
def test_workers_change_nothing(augmentation, tmp_path):
    recipe = folder_recipe(make_folder(tmp_path / "a"), augmentation=augmentation, erasing=0.3)
    data = load_data(recipe)
    found = [all_of(replace(data, recipe=replace(recipe, workers=w)).batches("train")) for w in (0, 2)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_one_folder_is_divided(tmp_path):
    data = load_data(folder_recipe(make_folder(tmp_path / "a", 10), val_fraction=0.2, test_fraction=0.3))
    assert data.classes == ("blue", "green", "red")
    assert [len(s) for s in (data.train, data.val, data.test)] == [16, 5, 9]
    assert len({*data.train.paths, *data.val.paths, *data.test.paths}) == 30
    assert load_data(folder_recipe(tmp_path / "a", test_fraction=0.0)).test is None


def test_train_and_val_folders(tmp_path):
    make_folder(tmp_path / "train", 8)
    make_folder(tmp_path / "val", 2)
    official = load_data(folder_recipe(tmp_path, val_fraction=None))
    assert (len(official.train), len(official.val), official.test) == (24, 6, None)
    held = load_data(folder_recipe(tmp_path, val_fraction=0.25))
    assert (len(held.train), len(held.val), len(held.test)) == (18, 6, 6)
    assert all("/val/" in p for p in held.test.paths)
    imagenet = load_data(replace(folder_recipe(tmp_path, val_fraction=None), data="imagenet"))
    assert imagenet.val.paths == official.val.paths
    make_folder(tmp_path / "test", 1)
    assert len(load_data(folder_recipe(tmp_path, val_fraction=None)).test) == 3
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "rouge")
    with pytest.raises(ValueError, match=r"must have the same classes as .*; they differ in red, rouge"):
        load_data(folder_recipe(tmp_path))


def test_missing_data_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_data(folder_recipe(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="one folder of images for each class"):
        load_data(folder_recipe(tmp_path))
    with pytest.raises(FileNotFoundError, match="as ImageNet is laid out"):
        load_data(replace(folder_recipe(tmp_path, val_fraction=None), data="imagenet"))
    for name in ("cifar10", "cifar100"):
        with pytest.raises(FileNotFoundError, match=rf"holds no {name} .*download=true"):
            load_data(Recipe(name="x", model="x", data=name, path=tmp_path))
    with pytest.raises(ValueError, match="part must be one of test, val, not 'train'"):
        load_part(Recipe(name="x", model="x"), "train")
    make_folder(tmp_path / "train", 4)
    with pytest.raises(ValueError, match="has no val/; set val_fraction"):
        load_data(folder_recipe(tmp_path, val_fraction=None))


def test_unreadable_images_are_named_counted_and_replaced(tmp_path):
    make_folder(tmp_path / "train", 8)
    make_folder(tmp_path / "val", 4)
    bad = {damage(tmp_path / "train" / "red" / "3.png"), damage(tmp_path / "train" / "blue" / "0.png")}
    bad |= {damage(tmp_path / "val" / "green" / f"{i}.png") for i in range(4)}  # a whole batch
    recipe = folder_recipe(tmp_path, val_fraction=None)
    data = load_data(recipe)
    batches = data.batches("train")
    assert isinstance(batches, FileBatches)
    _, y = all_of(batches)
    assert y.bincount().tolist() == [8, 8, 8]  # the next image is one of the same class here
    assert len(all_of(data.batches("val"))[1]) == 8
    run = fit(recipe, tmp_path / "run", progress=False)
    assert run.unreadable == 6
    assert set(run.unreadable_paths) == bad
    assert run.history[-1]["unreadable"] == 6
    found = evaluate(tmp_path / "run", "folder", tmp_path, device="cpu", batch=4, workers=0)
    assert (found.images, found.unreadable) == (8, 4)
    assert found.top1 == pytest.approx(run.val_accuracy)
    assert math.isnan(found.per_class["green"])
    assert "4 unreadable" in str(found)
    for workers in (0, 1):  # without and with a worker: one sentence, no traceback in it
        stopping, folder = replace(recipe, unreadable="stop", workers=workers), tmp_path / f"stop-{workers}"
        with pytest.raises(UnreadableImageError, match=r"^\S+\.png cannot be read [^\n]+=skip$"):
            fit(stopping, folder, progress=False)
    goes_on = fit(recipe, folder, resume=True, progress=False)  # as the sentence advises
    assert goes_on.unreadable == 6


def test_a_folder_is_learnt_and_scored_as_its_checkpoint_says(tmp_path):
    recipe = folder_recipe(make_folder(tmp_path / "a", 12), epochs=10, augmentation="flip_crop")
    run = fit(recipe, tmp_path / "run", progress=False)
    assert run.test_accuracy == 1.0
    few = tmp_path / "few"
    (few / "red").mkdir(parents=True)
    (tmp_path / "a" / "red" / "0.png").rename(few / "red" / "0.png")
    found = evaluate(tmp_path / "run", "folder", few, device="cpu", workers=0)
    assert (found.images, found.top1, found.top5) == (1, 1.0, None)
    (few / "red").rename(few / "rouge")
    with pytest.raises(ValueError, match="does not name: rouge"):
        evaluate(tmp_path / "run", "folder", few, device="cpu", workers=0)
    with pytest.raises(ValueError, match="two classes or more to tell apart, not only rouge"):
        evaluate(timm.create_model("resnet20_cifar"), "folder", few, device="cpu", workers=0)
    with pytest.raises(ValueError, match="has 10 outputs and the data 3 classes"):
        evaluate(timm.create_model("resnet20_cifar"), "folder", tmp_path / "a", device="cpu", workers=0)


def test_a_run_is_scored_on_what_it_held_out(tmp_path):
    recipe = folder_recipe(
        make_folder(tmp_path / "a", 20), val_fraction=0.2, test_fraction=0.3, split_seed=7
    )
    run = fit(recipe, tmp_path / "run", progress=False)
    data = load_data(recipe)
    for part, images in (("test", data.test), ("val", data.val)):
        found = evaluate(tmp_path / "run", part=part, device="cpu", workers=0)
        assert found.images == len(images)
        assert (
            evaluate(tmp_path / "run", "folder", recipe.path, part=part, device="cpu", workers=0) == found
        )
    assert evaluate(tmp_path / "run", device="cpu", workers=0).top1 == pytest.approx(run.test_accuracy)
    everything = evaluate(tmp_path / "run" / "best", "folder", recipe.path, device="cpu", workers=0)
    assert everything.images == len(data.train) + len(data.val) + len(data.test)


def test_evaluation_against_a_loop():
    model = timm.create_model("resnet20_cifar", in_chans=1).eval()
    found = evaluate(model, "digits", device="cpu", batch=100, pixels=16)
    data = load_data(Recipe(name="x", model="x", pixels=16))
    mean = model.pretrained_cfg["mean"]
    x = data.test.images / 255
    assert len(mean) == 3  # timm's three do not fit one channel: the data's are taken
    x = (x - data.mean[0]) / data.std[0]
    with torch.no_grad():
        logits = model(x)
    right = logits.argmax(1) == data.test.labels
    assert found.top1 == pytest.approx(right.float().mean().item())
    five = (logits.topk(5).indices == data.test.labels[:, None]).any(1)
    assert found.top5 == pytest.approx(five.float().mean().item())
    loss = torch.nn.functional.cross_entropy(logits, data.test.labels).item()
    assert found.loss == pytest.approx(loss, rel=1e-4)
    for name, share in found.per_class.items():
        assert share == pytest.approx(right[data.test.labels == int(name)].float().mean().item())


def fake_cifar(root, monkeypatch, n=40):
    """CIFAR-10 in miniature, its checksums with it."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def put(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(name, n):
        labels = [i % 10 for i in range(n)]
        return put(name, {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": labels})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}", n) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", n)])
    meta = put("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "filename": meta[0], "md5": meta[1]})


@pytest.mark.parametrize("augmentation", ["flip_crop", "rand-m9"])
def test_cifar_is_read_by_torchvision_and_trained_on(augmentation, tmp_path, monkeypatch):
    fake_cifar(tmp_path / "data", monkeypatch)
    recipe = Recipe(
        name="c", model="resnet20_cifar_mod", data="cifar10", path=tmp_path / "data", epochs=1, batch=60,
        augmentation=augmentation, accelerator="cpu", workers=2,
    )  # fmt: skip
    data = load_data(recipe)
    assert [len(s) for s in (data.train, data.val, data.test)] == [180, 20, 40]
    assert data.classes[3] == "class3"
    assert data.train.images.shape == (180, 3, 32, 32)
    run = fit(recipe, tmp_path / "run", progress=False)
    assert run.history[0]["train_loss"] > 0
    assert run.model.num_classes == 10


def unpacker(shared):
    spec = importlib.util.spec_from_file_location("unpack", shared / "data" / "unpack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imagenette_trains_for_a_step(shared, tmp_path):
    """Real JPEGs of many sizes and some grey, in ImageNet's layout."""
    if not (shared / "data" / "imagenette224.zip").is_file():
        pytest.skip("imagenette224.zip is not in ../shared/data")
    root = unpacker(shared).unpack("imagenette224", str(tmp_path), log=lambda text: None)
    recipe = Recipe(
        name="i", model="resnet20_cifar_mod", data="imagenet", path=root, val_fraction=None, epochs=1,
        batch=50, lr=0.05, augmentation="flip_crop", accelerator="cpu", workers=1,
    )  # fmt: skip
    for extra in [p for c in Path(root).glob("*/*") for p in sorted(c.iterdir())[20:]]:
        extra.unlink()
    run = fit(recipe, tmp_path / "run", progress=False)
    assert 1.5 < run.history[0]["train_loss"] < 3.5
    found = evaluate(run.folder, "imagenet", root, device="cpu", workers=0)
    assert (found.top1, found.images) == (pytest.approx(run.val_accuracy), 200)
    assert run.test_accuracy is None
    assert run.unreadable == 0


@pytest.mark.slow
def test_cifar10_itself(shared, tmp_path):
    if not (shared / "data" / "cifar10-test_batch.zip").is_file():
        pytest.skip("CIFAR-10 is not in ../shared/data")
    root = unpacker(shared).unpack("cifar10", str(tmp_path), log=lambda text: None)
    recipe = Recipe(name="c", model="resnet20_cifar", data="cifar10", path=root)
    data = load_data(recipe)
    assert [len(s) for s in (data.train, data.val, data.test)] == [45000, 5000, 10000]
    assert data.val.labels.bincount().tolist() == [500] * 10
    x, _ = all_of(data.batches("test"))
    assert x.mean().abs() < 0.02
    assert (x.std() - 1).abs() < 0.02
