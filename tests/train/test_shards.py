"""Shards: what is written, what is found, what is read; damaged ones; runs on them."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from _images import all_of, folder_recipe, make_folder
from _processes import run_two
from _runs import Stop, assert_same, killed
from _shards import layout, put
from pliant._files import NotWrittenError
from pliant.cli import app
from pliant.train import batches as batches_file
from pliant.train import evaluate, fit, read_run, shard_writing
from pliant.train.data import load_data
from pliant.train.images import UnreadableImageError
from pliant.train.shard_writing import write_shards
from pliant.train.shards import DamagedShardError, ShardImages, braces, find_shards, index_shards


@pytest.fixture
def root(tmp_path):
    """Images in train/ and val/, and the same in shards, in the same order."""
    make_folder(tmp_path / "images" / "train", 8)
    make_folder(tmp_path / "images" / "val", 4)
    write_shards(tmp_path / "images", tmp_path / "shards", images=10, shuffle=False)
    return tmp_path


def shard_recipe(path, **options):
    return replace(folder_recipe(path, val_fraction=None, **options), data="shards")


def test_shards_hold_the_files_as_they_are_in_the_format_of_webdataset(root):
    names = sorted(p.name for p in (root / "shards").iterdir())
    train = [f"train-0000{n}-of-00003.tar" for n in range(3)]
    assert names == [
        *("_info.json", "classes.txt"),
        *train,
        *("val-00000-of-00002.tar", "val-00001-of-00002.tar"),
    ]
    found = {}
    for name in train:
        with tarfile.open(root / "shards" / name) as archive:
            members = archive.getmembers()
            assert all((m.mtime, m.uid, m.mode) == (0, 0, 0o644) for m in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name.partition(".")[0] == label.name.partition(".")[0]
                content = [archive.extractfile(m).read() for m in (image, label)]
                found[image.name] = content
    assert len(found) == 24
    for name, (image, label) in found.items():
        path = root / "images" / "train" / name
        assert path.read_bytes() == image
        assert ["blue", "green", "red"][int(label)] == path.parent.name
    assert (root / "shards" / "classes.txt").read_text() == "blue\ngreen\nred\n"


def test_the_same_images_give_the_same_bytes_and_seeds_mix_them(root):
    def shards(name, **options):
        found = write_shards(root / "images", root / name, **options)
        return [p.read_bytes() for p in found]

    one, two, other = shards("1"), shards("2"), shards("3", seed=1)
    assert one == two
    assert one != other
    plain, _ = index_shards(find_shards(f"{root}/shards")["train"])
    mixed, labels = index_shards(find_shards(f"{root}/1")["train"])
    assert list(plain["member"]) == sorted(plain["member"])
    assert list(mixed["member"]) != sorted(mixed["member"])
    assert sorted(mixed["member"]) == sorted(plain["member"])
    names = [["blue", "green", "red"][n] for n in labels]
    assert names == [m.decode().partition("/")[0] for m in mixed["member"]]


def test_names_with_dots_and_the_same_stem_stay_apart(tmp_path):
    folder = tmp_path / "images" / "v1.0"
    folder.mkdir(parents=True)
    for name in ("a.b.png", "a_b.png", "a_b.JPG", "ä" * 60 + ".png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (shard,) = write_shards(tmp_path / "images", tmp_path / "shards", shuffle=False)
    index, labels = index_shards([shard])
    keys = [m.decode() for m in index["member"]]
    assert keys == ["v1.0/a_b.png", "v1.0/a_b-2.jpg", "v1.0/a_b-3.png", f"v1.0/{'ä' * 60}.png"]
    images = ShardImages([shard], index, labels)
    files = {p.read_bytes() for p in folder.iterdir()}
    assert {images.content(i) for i in range(4)} == files
    (folder / "c.tif").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.tif must be a \.jpg, .* file for readers of shards"):
        write_shards(tmp_path / "images", tmp_path / "more")


def test_nothing_partial_has_a_name(root, monkeypatch):
    real, calls = shard_writing._write, []

    def fails(path, samples):
        real(path, samples[:3])
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writing, "_write", fails)
    with pytest.raises(NotWrittenError, match=r"train-00001-of-00003\.tar cannot be written \(No space"):
        write_shards(root / "images", root / "new", images=10)
    assert sorted(p.name for p in (root / "new").iterdir()) == ["classes.txt", "train-00000-of-00003.tar"]
    with pytest.raises(ValueError, match="new holds shards already, such as train-00000-of-00003"):
        write_shards(root / "images", root / "new")
    # And a reader does not take what is there for all there is.
    with pytest.raises(FileNotFoundError, match=r"train-00001-of-00003\.tar is missing: only 1 of 3"):
        load_data(shard_recipe(root / "new"))


def test_what_a_killed_process_left_is_no_shard(root):
    for hidden in (".train-00003-of-00003.tar.0123abcd.tmp/train-00003-of-00003.tar", "._train.tar"):
        (root / "shards" / hidden).parent.mkdir(exist_ok=True)
        (root / "shards" / hidden).write_bytes(b"half")
    assert {part: len(paths) for part, paths in find_shards(root / "shards").items()} == {
        "train": 3,
        "val": 2,
    }


def test_an_image_that_cannot_be_read_is_told_as_that(root, monkeypatch):
    def fails(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(ValueError, match=r"blue.0\.png cannot be read \(Input/output error\)"):
        write_shards(root / "images", root / "new", shuffle=False)
    monkeypatch.undo()
    assert [p.name for p in (root / "new").iterdir()] == ["classes.txt"]


def test_wrong_folders_are_refused(root):
    with pytest.raises(FileNotFoundError, match="one folder of images for each class"):
        write_shards(root, root / "new")
    (root / "images" / "val" / "red").rename(root / "images" / "val" / "rouge")
    with pytest.raises(ValueError, match=r"must have the same classes as .*; they differ in red, rouge"):
        write_shards(root / "images", root / "new")
    with pytest.raises(ValueError, match="images must be at least 1, not 0"):
        write_shards(root / "images", root / "new", images=0)
    assert not (root / "new").exists()


def test_a_pattern_names_shards_as_a_shell_would(root):
    whole = find_shards(f"{root}/shards")
    assert {part: len(paths) for part, paths in whole.items()} == {"train": 3, "val": 2}
    patterns = [
        f"{root}/shards/*.tar",
        f"{root}/shards/{{train,val}}-*.tar",
        f"{root}/shards/{{train-{{00000..00002}}-of-00003,val-{{00000..00001}}-of-00002}}.tar",
        f"{root}/{{shards}}/[tv]*.tar",
    ]
    assert all(find_shards(pattern) == whole for pattern in patterns)
    assert braces("a{1,2}{x,y}") == ["a1x", "a1y", "a2x", "a2y"]
    assert braces("{9..11}") == ["9", "10", "11"]
    (root / "flat").mkdir()
    for n, path in enumerate(whole["train"]):
        (root / "flat" / f"{n}.tar").write_bytes(path.read_bytes())
    assert {p: len(s) for p, s in find_shards(f"{root}/flat").items()} == {"": 3}
    (root / "flat").rename(root / "validation")  # a folder's name may say it too
    assert list(find_shards(f"{root}/validation/*.tar")) == ["val"]
    (root / "validation" / "train-x.tar").write_bytes(b"")
    assert sorted(find_shards(f"{root}/validation")) == ["train", "val"]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("shards/none-*.tar", "names no shards; give a folder"),
        ("nowhere", "shard .*nowhere is missing"),
        ("shards/train-{00000..00003}-of-00003.tar", r"shard .*train-00003-of-00003\.tar is missing"),
        ("shards/train-{00000,00002}-of-00003.tar", r"train-00001-of-00003\.tar is missing: only 2 of 3"),
    ],
)
def test_missing_shards_are_named(root, pattern, told):
    with pytest.raises(FileNotFoundError, match=told):
        find_shards(f"{root}/{pattern}")


def test_each_of_several_numbered_sets_has_to_be_whole(tmp_path):
    for name in ("a-train-0-of-1", "b-train-0-of-2"):
        (tmp_path / f"{name}.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"b-train-1-of-2\.tar is missing: only 1 of 2 shards"):
        find_shards(str(tmp_path))
    (tmp_path / "b-train-1-of-2.tar").touch()
    assert len(find_shards(str(tmp_path))["train"]) == 3


def test_a_name_that_does_not_say_its_part_is_refused(root):
    (root / "shards" / "extra.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"extra\.tar does not say train, val or test"):
        find_shards(f"{root}/shards")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_what_the_folder_gives(root, workers):
    """The same images, order and augmentation, bit by bit, with and without workers."""
    options = {"augmentation": "rand-m9-mstd0.5", "erasing": 0.3, "workers": workers}
    folder = load_data(folder_recipe(root / "images", val_fraction=None, **options))
    shards = load_data(shard_recipe(root / "shards", **options))
    assert shards.classes == folder.classes == ("blue", "green", "red")
    for part in ("train", "val", "check"):
        one, two = (data.batches(part) for data in (folder, shards))
        one.set_epoch(3)
        two.set_epoch(3)
        assert all(torch.equal(a, b) for a, b in zip(all_of(one), all_of(two), strict=True))


def test_one_set_of_shards_is_divided_like_a_folder(root):
    path = f"{root}/images/train"
    write_shards(path, root / "whole", images=7, shuffle=False)
    options = {"val_fraction": 0.25, "test_fraction": 0.25}
    one = load_data(folder_recipe(path, **options))
    two = load_data(replace(folder_recipe(root / "whole", **options), data="shards"))
    for a, b in ((one.train, two.train), (one.val, two.val), (one.test, two.test)):
        names = [Path(p).parent.name + "/" + Path(p).name for p in a.paths]
        assert names == [m.decode() for m in b.index["member"]]
    held = load_data(shard_recipe(root / "shards"))
    assert (len(held.train), len(held.val), held.test) == (24, 12, None)
    official = load_data(replace(shard_recipe(root / "shards"), val_fraction=0.25))
    assert [len(s) for s in (official.train, official.val, official.test)] == [18, 6, 12]


def test_processes_see_disjoint_shares_of_the_same_order(root, monkeypatch):
    data = load_data(shard_recipe(root / "shards"))

    def seen(rank, world, train):
        monkeypatch.setattr(batches_file, "place", lambda: (rank, world))
        loader = data.batches("train" if train else "val")
        return [i for index in loader.order() for i in index.tolist()]

    for train, count in ((True, 24), (False, 12)):
        shares = [seen(rank, 3, train) for rank in range(3)]
        assert [len(share) for share in shares] == [count // 3] * 3
        assert sorted(i for share in shares for i in share) == list(range(count))
    alone = seen(0, 1, True)
    assert [i for group in zip(*(seen(r, 2, True) for r in range(2)), strict=True) for i in group] == alone


def test_a_worker_that_is_not_forked_opens_its_own_files(root):
    images = load_data(shard_recipe(root / "shards")).train
    first = images.image(0)
    again = pickle.loads(pickle.dumps(images))
    assert (again._files, list(images._files)) == ({}, [0])
    assert again.image(0).tobytes() == first.tobytes()
    images._process = -1  # as after a fork: the file's position is shared, so it is opened anew
    old = images._files[0]
    assert images.image(0).tobytes() == first.tobytes()
    assert images._files[0] is not old


def test_no_more_files_are_open_than_a_system_allows(root, monkeypatch):
    monkeypatch.setattr("pliant.train.shards._OPEN", 2)
    images = load_data(shard_recipe(root / "shards")).train
    opened = []
    for i in (0, 10, 20, 0):
        images.image(i)
        opened.append(list(images._files))
    assert opened == [[0], [0, 1], [1, 2], [2, 0]]


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_a_shard_that_is_cut_off_is_named_with_its_last_whole_member(root):
    path = root / "shards" / "train-00001-of-00003.tar"
    whole = path.read_bytes()
    members = layout(path)
    name, header, begin, end = members[6]
    before = members[5][0]
    # In the header, in the content, and where tarfile itself says nothing: between two members.
    for size in (header + 100, (begin + end) // 2, header, len(whole) - 10240):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedShardError, match=r"train-00001-of-00003\.tar is damaged or cut") as told:
            load_data(shard_recipe(root / "shards"))
        last = name if size == (begin + end) // 2 else members[-1][0] if size > end else before
        assert f"after {last} (" in str(told.value)
    path.write_bytes(whole[: header + 20] + b"\xff" * 40 + whole[header + 60 :])  # a damaged header
    with pytest.raises(DamagedShardError, match=f"after {before}"):
        load_data(shard_recipe(root / "shards"))
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(DamagedShardError, match=r"as a \.tar file without compression"):
        load_data(shard_recipe(root / "shards"))
    path.write_bytes(b"")
    with pytest.raises(DamagedShardError, match="after its beginning"):
        load_data(shard_recipe(root / "shards"))


def test_counts_are_compared_with_the_index(root):
    info = json.loads((root / "shards" / "_info.json").read_text())
    assert info["splits"]["train"] == {
        "name": "train",
        "filenames": [f"train-0000{n}-of-00003.tar" for n in range(3)],
        "shard_lengths": [10, 10, 4],
        "num_samples": 24,
    }
    info["splits"]["train"]["shard_lengths"][1] = 11
    (root / "shards" / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DamagedShardError, match=r"train-00001-of-00003\.tar has 10 images, and .* says 11"):
        load_data(shard_recipe(root / "shards"))
    (root / "shards" / "_info.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"_info\.json is no index of shards"):
        load_data(shard_recipe(root / "shards"))


def test_a_shard_that_links_lead_to_is_taken_once(root):
    (root / "shards" / "self").symlink_to(root / "shards")
    (root / "shards" / "train-x.tar").symlink_to(root / "shards" / "train-00000-of-00003.tar")
    assert [len(paths) for paths in find_shards(f"{root}/shards").values()] == [3, 2]
    assert len(find_shards(f"{root}/shards/{{train-*,*}}.tar")["train"]) == 3


@pytest.mark.parametrize(
    ("members", "told"),
    [
        (
            [("a.png", b"x"), ("b.png", b"x"), ("b.cls", b"0")],
            r"sample a of .*s\.tar has no class \(\.cls\)",
        ),
        ([("a.cls", b"0"), ("a.json", b"{}")], r"sample a of .*s\.tar has no image \(\.jpg, "),
        (
            [("a.png", b"x"), ("a.cls", b"cat")],
            r"s\.tar/a\.cls must hold the number of a class, from 0, not 'cat'",
        ),
        (
            [("a.png", b"x"), ("a.cls", b"9" * 5000)],
            r"s\.tar/a\.cls must hold a number of at most 9 digits",
        ),
        ([(f"{'a' * 5000}.png", b"x"), (f"{'a' * 5000}.cls", b"0")], "with a name of 5004 bytes, aaa"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, told):
    put(tmp_path / "s.tar", members)
    with pytest.raises(ValueError, match=told):
        index_shards([tmp_path / "s.tar"])


def test_other_members_and_no_names_of_classes(tmp_path, root):
    image = next((root / "images" / "train" / "red").iterdir()).read_bytes()
    members = []
    for n in range(20):
        members += [(f"{n}.cls", str(n % 2).encode()), (f"{n}.json", b"{}"), (f"{n}.png", image)]
    put(tmp_path / "s.tar", members)
    recipe = replace(folder_recipe(f"{tmp_path}/s.tar", val_fraction=0.2, test_fraction=0.2), data="shards")
    data = load_data(recipe)
    assert data.classes == ("0", "1")
    assert data.train.labels.tolist() == [
        int(m) % 2 for m in (n.split(b".")[0] for n in data.train.index["member"])
    ]
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="names 1 classes, but the shards have class 1"):
        load_data(recipe)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert load_data(recipe).classes == ("cat", "dog")


def test_an_image_that_cannot_be_transformed_is_unreadable(root):
    """A strip of 1 by 1,000,000 pixels, whose short side would be resized to 37."""
    strip = root / "images" / "val" / "red" / "0.png"
    Image.new("RGB", (1_000_000, 1)).save(strip)
    recipe = folder_recipe(root / "images", val_fraction=None)
    batches = load_data(recipe).batches("val")
    assert len(all_of(batches)[1]) == 11
    assert batches.unreadable == {str(strip)}
    stopping = load_data(replace(recipe, unreadable="stop")).batches("val")
    with pytest.raises(
        UnreadableImageError, match=r"cannot be read \(1000000 x 1 pixels would be resized to"
    ):
        list(stopping)


def test_validation_shards_with_more_classes_are_refused(root):
    put(root / "shards" / "val-x.tar", [("a.png", b"x"), ("a.cls", b"3")])
    with pytest.raises(
        ValueError, match=r"shards such as .*val.* have class 3, but the shards to train on have 3"
    ):
        load_data(shard_recipe(root / "shards"))


def test_a_damaged_image_is_named_by_shard_and_member(root):
    path = root / "shards" / "train-00000-of-00003.tar"
    name, _, begin, end = layout(path)[4]
    content = bytearray(path.read_bytes())
    content[begin : (begin + end) // 2] = bytes((begin + end) // 2 - begin)
    path.write_bytes(content)
    recipe = shard_recipe(root / "shards", epochs=1)
    run = fit(recipe, root / "run", progress=False)
    assert run.unreadable_paths == (f"{path}/{name}",)
    with pytest.raises(UnreadableImageError, match=rf"train-00000-of-00003\.tar/{name} cannot be read"):
        fit(replace(recipe, unreadable="stop"), root / "stop", progress=False)


def test_a_shard_that_shrinks_after_it_was_indexed_costs_its_images(root):
    data = load_data(shard_recipe(root / "shards"))
    cut(data.train.shards[2], 700)
    last = len(data.train) - 1
    with pytest.raises(ValueError, match="the shard ends after 0 of its"):
        data.train.content(last)
    loader = data.batches("train")
    all_of(loader)
    assert {Path(p.partition(".tar")[0]).name for p in loader.unreadable} == {"train-00002-of-00003"}


def test_a_run_on_shards_is_scored_on_shards_and_on_folders(root):
    run = fit(shard_recipe(root / "shards", epochs=2), root / "run", progress=False)
    same = fit(folder_recipe(root / "images", val_fraction=None, epochs=2), root / "same", progress=False)
    one, two = run.model.state_dict(), same.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)
    for data, path in (("shards", root / "shards"), ("folder", root / "images"), (None, None)):
        found = evaluate(run.folder, data, path, part="val", device="cpu", workers=0)
        assert (found.images, found.top1) == (12, pytest.approx(run.val_accuracy))
    assert evaluate(run.folder, "shards", f"{root}/shards/val-*.tar", device="cpu", workers=0).images == 12
    with pytest.raises(ValueError, match="has no images for val, only train"):
        evaluate(run.folder, "shards", f"{root}/shards/train-*.tar", part="val", device="cpu")


def test_a_run_on_shards_goes_on_to_the_same_bits(root):
    recipe = shard_recipe(root / "shards", epochs=2, augmentation="flip_crop", checkpoint_minutes=0)
    whole = fit(recipe, root / "whole", progress=False)
    with pytest.raises(KeyError, match="stopped"):
        fit(recipe, root / "run", progress=False, callbacks=[Stop(9)])
    assert_same(fit(recipe, root / "run", resume=True, progress=False), whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_on_shards_goes_on_to_the_same_bits(root, workers):
    recipe = shard_recipe(root / "shards", augmentation="rand-m9-mstd0.5", workers=workers, threads=1)
    whole = fit(replace(recipe, checkpoint_minutes=3 / 60), root / "whole", progress=False)
    killed((root / "run", recipe, ("on_train_batch_start", 10)))
    run = fit(replace(recipe, checkpoint_minutes=3 / 60), root / "run", resume=True, progress=False)
    assert_same(run, whole)


TWO = """
import json, sys
from lightning.pytorch.callbacks import Callback
from pliant.train import Recipe, fit
from pliant.train.processes import place

class Seen(Callback):
    # The members that this process's batches are made of, in each epoch.
    def on_train_epoch_end(self, trainer, pl_module):
        loader = trainer.train_dataloader
        index = [i for part in loader.order() for i in part.tolist()]
        names = [loader.images.where(i).rpartition(".tar/")[2] for i in index]
        print(place()[0], json.dumps(names), flush=True)

for folder, recipe in json.loads(sys.argv[1]):
    fit(Recipe.from_dict(recipe), folder, progress=False, callbacks=[Seen()] * (recipe["data"] == "shards"))
"""


@pytest.mark.slow
def test_two_processes_train_on_shards_as_on_a_folder(root):
    options = {"batch": 3, "devices": 2, "augmentation": "flip_crop", "threads": 1}
    recipes = [
        (f"{root}/shards-run", shard_recipe(root / "shards", **options)),
        (f"{root}/run", folder_recipe(root / "images", val_fraction=None, **options)),
    ]
    said = run_two(TWO, json.dumps([(folder, recipe.as_dict()) for folder, recipe in recipes]))
    shares = [[json.loads(line[2:]) for line in text.splitlines() if line[1:3] == " ["] for text in said]
    for first, second in zip(*shares, strict=True):  # of each epoch
        assert len(first) == len(second) == 12
        assert not set(first) & set(second)
    assert set(shares[0][0]) != set(shares[0][1])  # other images in the next
    weights = [read_run(folder).model.state_dict() for folder, _ in recipes]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_the_command_packs(root):
    done = CliRunner().invoke(app, ["shards", f"{root}/images", f"{root}/new", "--images", "12"])
    assert done.exit_code == 0, done.output
    assert f"3 shards in {root}/new; train with data=shards path={root}/new" in done.output
    assert len(load_data(shard_recipe(root / "new")).train) == 24
