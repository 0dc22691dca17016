"""Routing weights of CondConv networks over a data set, and figures 4 to 7."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import pliant
from pliant import cli
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router, SharedRouting
from pliant.train.evaluation import prepare
from research.analysis import expert_plots
from research.analysis.expert_plots import (
    plot_mean_routing,
    plot_routing_spread,
    plot_top_classes,
    plot_weight_histogram,
)
from research.analysis.expert_report import FIGURES, ROWS, WEIGHTS, report_experts
from research.analysis.experts import RoutingWeights, routers_of, routing_weights
from research.commands import app

CLASSES = ("cat", "dog", "owl")


class Brightness(nn.Module):
    """A router whose weights are known: an image of constant v gets (v, 1 - v)."""

    experts = 2

    def forward(self, x):
        v = x.flatten(1).mean(1)
        return torch.stack([v, 1 - v], 1)


class Tiny(nn.Module):
    """One convolution and a classifier, both mixed by routers that are known."""

    def __init__(self):
        super().__init__()
        self.conv = CondConv2d(1, 2, 1, experts=2, router=Brightness())
        self.drop = nn.Dropout(0.9)
        self.fc = CondLinear(2, 3, experts=2, router=Router(2, 2, active=1))
        nn.init.zeros_(self.fc.router.fc2.weight)
        self.fc.router.fc2.bias = nn.Parameter(torch.tensor([3.0, -3.0]))

    def forward(self, x):
        return self.fc(self.drop(self.conv(x)).mean((2, 3)))


def bright(values, labels, batch=2):
    x = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return list(zip(x.split(batch), torch.tensor(labels).split(batch), strict=True))


@pytest.fixture
def known():
    """Five images in three batches; no owl."""
    return routing_weights(Tiny(), bright([0.1, 0.5, 0.9, 0.7, 0.3], [1, 0, 1, 1, 0]), CLASSES)


def network(**options):
    return timm.create_model("cc_mobilenetv1_025_cifar", experts=4, begin=12, **options)


def images(n=6, classes=3, batch=4):
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(batch), (torch.arange(n) % classes).split(batch), strict=True))


def test_known_weights_by_example_class_and_over_all(known):
    assert known.layers == ("conv", "fc")
    assert known.shared == {}
    assert known.labels.tolist() == [1, 0, 1, 1, 0]
    assert known.examples.tolist() == [0, 1, 2, 3, 4]
    assert known.counts().tolist() == [2, 3, 0]
    v = torch.tensor([0.1, 0.5, 0.9, 0.7, 0.3])
    torch.testing.assert_close(known.weights["conv"], torch.stack([v, 1 - v], 1))
    assert known.weights["conv"].dtype == torch.float32
    mean, std = known.mean("conv"), known.std("conv")
    assert mean[:2, 0].tolist() == pytest.approx([0.4, 1.7 / 3])
    assert std[:2, 1].tolist() == pytest.approx([0.1, np.std([0.1, 0.9, 0.7])])
    assert mean[2].isnan().all()
    assert std[2].isnan().all()
    assert known.overall("conv").tolist() == pytest.approx([0.5, 0.5])


def test_top_classes_and_best_examples(known):
    top = known.top_classes("conv", 0)
    assert [(c.name, c.label) for c in top] == [("dog", 1), ("cat", 0)]  # owl has no image
    assert top[0].mean == pytest.approx(1.7 / 3)
    assert [c.name for c in known.top_classes("conv", 1, n=1)] == ["cat"]
    assert known.best_example("conv", 0, "dog") == 2
    assert known.best_example("conv", 1, "dog") == 0
    assert known.best_example("conv", 1, 0) == 4


def test_histogram_counts_every_weight_once(known):
    counts, edges = known.histogram("conv", bins=4)
    assert edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert counts.tolist() == [1 + 1, 1 + 1, 1 + 1 + 2, 1 + 1]  # 0.5 opens the third
    assert known.histogram("fc", bins=2)[0].tolist() == [5, 5]


def test_idle_experts_of_hard_routing(known):
    assert known.idle("fc") == [1]
    assert known.idle("conv") == []
    assert known.idle("conv", threshold=0.95) == [0, 1]
    model = Tiny().eval()
    model(bright([0.1, 0.5], [0, 1])[0][0]).sum().backward()
    assert model.fc.weight.grad[0].abs().sum() > 0
    assert model.fc.weight.grad[1].abs().sum() == 0  # what idle promises


def test_rows_are_the_same_figures(known):
    rows = known.rows()
    assert len(rows) == 2 * 2 * 2  # layers, classes with images, experts
    found = {(r.layer, r.name, r.expert): r for r in rows}
    dog = found["conv", "dog", 0]
    assert (dog.images, dog.best_example) == (3, 2)
    assert (dog.mean, dog.std, dog.best_weight) == pytest.approx(
        (1.7 / 3, float(np.std([0.1, 0.9, 0.7])), 0.9)
    )


def test_per_class_takes_the_first_images_and_keeps_their_numbers():
    data = bright([0.1, 0.5, 0.9, 0.7, 0.3, 0.2], [1, 1, 1, 0, 2, 0])
    found = routing_weights(Tiny(), data, CLASSES, per_class=1)
    assert found.examples.tolist() == [0, 3, 4]
    assert found.labels.tolist() == [1, 0, 2]
    assert found.weights["conv"][:, 0].tolist() == pytest.approx([0.1, 0.7, 0.3])
    assert found.best_example("conv", 0, "cat") == 3


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("routing", ["block", "layer"])
def test_weights_are_those_of_the_routers(routing, activation):
    model = network(routing=routing, activation=activation).eval()
    found = routing_weights(model, images(), CLASSES)
    assert set(found.layers) == set(routers_of(model))
    assert found.layers[-1] == "classifier"
    assert len(found.layers) == {"block": 4, "layer": 7}[routing]
    with torch.no_grad():
        features = torch.cat([model.forward_features(x) for x, _ in images()])
        pooled = model.forward_head(features, pre_logits=True)
        expected = model.classifier.router(pooled)
    torch.testing.assert_close(found.weights["classifier"], expected)
    if activation == "softmax":
        torch.testing.assert_close(found.weights[found.layers[0]].sum(1), torch.ones(6))


def test_channels_are_averaged():
    model = network(per_channel=True)
    found = routing_weights(model, images(), CLASSES)
    given = []
    model.classifier.router.register_forward_hook(lambda *call: given.append(call[2].detach()))
    model.eval()
    for x, _ in images():
        model(x)
    assert given[0].shape == (4, 4, 10)
    torch.testing.assert_close(found.weights["classifier"], torch.cat(given).mean(2))


@pytest.mark.parametrize("routing", ["single", "shared", "hierarchical"])
def test_shared_routings_are_named_with_their_source(routing):
    model = network(routing=routing)
    found = routing_weights(model, images(), CLASSES)
    first, second, third, last = found.layers
    expected = {
        "single": dict.fromkeys((second, third, last), first),
        "shared": {second: first, last: third},
        "hierarchical": {},
    }
    assert found.shared == expected[routing]
    assert found.shared.keys() == {p for p, r in routers_of(model).items() if isinstance(r, SharedRouting)}
    for layer, source in found.shared.items():
        assert found.weights[layer] is found.weights[source]
    assert {r.layer for r in found.rows()} == set(found.layers) - set(found.shared)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training):
    model = network().train(training)
    model.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    routing_weights(model, images(), CLASSES)
    with pytest.raises(ValueError, match="2 classes"):
        routing_weights(model, images(), ["a", "b"])
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_compiled_network_and_double_precision():
    model = network()
    whole = routing_weights(model, images(), CLASSES)
    again = routing_weights(torch.compile(model), images(), CLASSES)
    assert again.layers == whole.layers
    assert torch.equal(again.weights["classifier"], whole.weights["classifier"])
    double = routing_weights(model.double(), images(), CLASSES)
    torch.testing.assert_close(double.weights["classifier"], whole.weights["classifier"])


class Skips(nn.Module):
    """A network whose first layer runs as often as it is told."""

    def __init__(self, times):
        super().__init__()
        self.tiny, self.times = Tiny(), times

    def forward(self, x):
        for _ in range(self.times):
            self.tiny.conv(x)
        return self.tiny.fc(x.expand(-1, 2, -1, -1).mean((2, 3)))


def test_layers_that_do_not_run_are_missing():
    assert routing_weights(Skips(0), bright([0.1], [0]), CLASSES).layers == ("tiny.fc",)


def test_errors_name_the_reason():
    data = bright([0.1, 0.5], [0, 1])
    for model, batches, classes, message in [
        (timm.create_model("resnet20_cifar"), data, CLASSES, "ResNet has no CondConv layer with a router"),
        (Tiny(), data, ["cat"], "label of 0 to 1 has no name: 1 classes"),
        (Tiny(), [], CLASSES, "no images"),
        (Tiny(), [(data[0][0], torch.rand(2, 3))], CLASSES, "whole numbers, one for each image"),
        (Tiny(), [(data[0][0], torch.tensor([0]))], CLASSES, "one for each image"),
        (Skips(2), data, CLASSES, "tiny.conv ran more than once"),
        (Tiny(), bright([math.nan], [0]), CLASSES, "conv gives weights that are not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            routing_weights(model, batches, classes)
    with pytest.raises(ValueError, match="per_class must be at least 1"):
        routing_weights(Tiny(), data, CLASSES, per_class=0)


def test_questions_without_an_answer(known):
    for ask, message in [
        (lambda: known.mean("conv2"), "no layer 'conv2'; there are conv, fc"),
        (lambda: known.top_classes("conv", 2), "no expert 2; conv has 0 to 1"),
        (lambda: known.best_example("conv", -1, "cat"), "no expert -1"),
        (lambda: known.best_example("conv", 0, "cow"), "no class 'cow'; the 3 classes are cat, dog, owl"),
        (lambda: known.best_example("conv", 0, 3), "no class 3"),
        (lambda: known.best_example("conv", 0, "owl"), "no image of class 'owl'"),
        (lambda: known.histogram("conv", bins=0), "bins must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask()
    twice = RoutingWeights(("crane", "crane"), known.labels, known.examples, known.weights)
    with pytest.raises(ValueError, match="name of several classes; take a label of"):
        twice.label("crane")
    assert twice.best_example("conv", 0, 1) == 2


def test_parts_that_do_not_fit_are_refused(known):
    with pytest.raises(ValueError, match="must come with N labels"):
        RoutingWeights(CLASSES, known.labels[:2], known.examples[:2], known.weights)
    with pytest.raises(ValueError, match="1 classes were given"):
        RoutingWeights(("cat",), known.labels, known.examples, known.weights)


def test_a_file_gives_all_back(tmp_path):
    found = routing_weights(network(routing="shared"), images(), CLASSES, per_class=1)
    path = found.save(tmp_path / "new" / "routing.npz")
    again = RoutingWeights.load(path)
    assert (again.classes, again.layers, again.shared) == (found.classes, found.layers, found.shared)
    assert torch.equal(again.labels, found.labels)
    assert torch.equal(again.examples, found.examples)
    for layer in found.layers:
        assert torch.equal(again.weights[layer], found.weights[layer])
    with np.load(path, allow_pickle=False) as file:  # as anybody may read it
        assert file["sources"].tolist() == [found.shared.get(layer, layer) for layer in found.layers]
        assert sum(name.startswith("weights/") for name in file.files) == 2


def test_a_file_that_is_none(tmp_path, known):
    with pytest.raises(ValueError, match=r"suffix must be \.npz"):
        known.save(tmp_path / "routing.csv")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        RoutingWeights.load(tmp_path / "none.npz")
    whole = known.save(tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    np.save(tmp_path / "array.npy", np.zeros(2))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("other", "array", "empty", "cut"):
        with pytest.raises(ValueError, match=f"{name}.npz is no whole file of routing weights"):
            RoutingWeights.load(tmp_path / f"{name}.npz")


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was written."""
    figures = []
    write = expert_plots.write_figure
    monkeypatch.setattr(expert_plots, "write_figure", lambda f, p: figures.append(f) or write(f, p))
    return lambda: figures[-1]


def heights(axes):
    return [bar.get_height() for bar in axes.patches]


def inked(path):
    """Whether a picture has more than its background."""
    return np.asarray(Image.open(path).convert("L")).std() > 5


def test_figure_4_draws_means_against_all(known, drawn, tmp_path):
    path = plot_mean_routing(known, tmp_path / "mean.png")
    assert inked(path)
    panels = drawn().axes
    assert [axes.get_title("left") for axes in panels] == ["conv", "fc"]
    for axes, layer in zip(panels, known.layers, strict=True):
        assert heights(axes) == pytest.approx(known.overall(layer).tolist())
        assert [line.get_label() for line in axes.lines] == ["cat", "dog"]  # owl has no image
        for label, line in enumerate(axes.lines):
            assert list(line.get_ydata()) == pytest.approx(known.mean(layer)[label].tolist())
            assert [round(x) for x in line.get_xdata()] == [0, 1]
        low, high = axes.get_ylim()
        assert low == 0
        assert high >= 0.95  # fc's highest, in all panels
    plot_mean_routing(known, tmp_path / "one.svg", classes=["dog"], layers=["conv"])
    assert "dog" in (tmp_path / "one.svg").read_text()
    assert len(drawn().axes) == 1


def test_figure_4_takes_layers_of_all_depths_that_have_routers(drawn, tmp_path):
    found = routing_weights(network(routing="shared"), images(), CLASSES)
    plot_mean_routing(found, tmp_path / "mean.svg")
    assert [axes.get_title("left") for axes in drawn().axes] == [found.layers[0], found.layers[2]]
    plot_mean_routing(found, tmp_path / "mean.svg", layers=["classifier"])
    assert drawn().axes[0].get_title("left") == f"classifier (routing of {found.layers[2]})"
    layers = {f"l{n}": torch.rand(3, 2) for n in range(10)}
    plot_mean_routing(
        RoutingWeights(("a",), torch.zeros(3).long(), torch.arange(3), layers), tmp_path / "a.svg"
    )
    assert [axes.get_title("left") for axes in drawn().axes] == ["l0", "l3", "l6", "l9"]


def test_figure_5_draws_one_standard_deviation(known, drawn, tmp_path):
    assert inked(plot_routing_spread(known, tmp_path / "spread.png", layer="conv"))
    panels = drawn().axes
    assert [axes.get_title("left") for axes in panels] == ["cat (2 images)", "dog (3 images)"]
    for label, axes in enumerate(panels):
        mean, std = known.mean("conv")[label], known.std("conv")[label]
        assert heights(axes) == pytest.approx(mean.tolist())
        (_, _, (lines,)) = axes.containers[0].lines
        ends = [segment[:, 1].tolist() for segment in lines.get_segments()]
        low, high = (mean - std).tolist(), (mean + std).tolist()
        assert ends == [pytest.approx(pair) for pair in zip(low, high, strict=True)]
    plot_routing_spread(known, tmp_path / "last.svg")
    assert "expert of fc" in (tmp_path / "last.svg").read_text()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_figure_6_shows_the_image_of_highest_weight(shape, known, drawn, tmp_path):
    asked = []

    def image(number):
        asked.append(number)
        return np.full(shape, 40 * number, np.uint8)

    assert inked(plot_top_classes(known, image, tmp_path / "top.png", layer="conv"))
    panels = drawn().axes
    assert asked == [2, 1, 4, 0]  # expert 0: dog, cat; expert 1: cat, dog
    assert [axes.get_title() for axes in panels] == ["dog\n0.57", "cat\n0.40", "cat\n0.60", "dog\n0.43"]
    assert [int(axes.images[0].get_array().max()) for axes in panels] == [80, 40, 160, 0]
    assert [axes.get_ylabel() for axes in panels] == ["expert 0", "", "expert 1", ""]


def test_figure_6_takes_pil_tensors_and_the_most_specific_experts(drawn, tmp_path):
    one = torch.tensor([[0.5, 0.9, 0.0, 0.2, 0.3, 0.4]])
    two = torch.tensor([[0.5, 0.1, 0.3, 0.3, 0.6, 0.4]])  # 1, 4, 2, 3 differ, in this order
    found = RoutingWeights(("a", "b"), torch.tensor([0, 1]), torch.arange(2), {"fc": torch.cat([one, two])})
    plot_top_classes(found, lambda n: Image.new("RGB", (5, 4), (n, 0, 0)), tmp_path / "a.svg")
    assert [axes.get_ylabel() for axes in drawn().axes[::2]] == [f"expert {n}" for n in (1, 2, 3, 4)]
    plot_top_classes(found, lambda n: torch.rand(4, 5, 3), tmp_path / "a.svg", experts=[5], n=1)
    assert len(drawn().axes) == 1
    with pytest.raises(ValueError, match=r"must be of \[H, W\]"):
        plot_top_classes(found, lambda n: torch.rand(3, 4, 5), tmp_path / "b.svg")
    for options in ({"experts": []}, {"n": 0}):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot_top_classes(found, lambda n: torch.rand(4, 5), tmp_path / "b.svg", **options)
    assert not (tmp_path / "b.svg").exists()


def test_figure_7_draws_shares_of_all_weights(known, drawn, tmp_path):
    assert inked(plot_weight_histogram(known, tmp_path / "histogram.png", layer="conv", bins=4))
    (axes,) = drawn().axes
    assert heights(axes) == pytest.approx([20, 20, 40, 20])
    assert axes.get_title("left") == "conv: 2 experts, 5 images"


@pytest.mark.parametrize(("classes", "experts"), [(1, 1), pytest.param(12, 64, marks=pytest.mark.slow)])
def test_figures_of_any_size(classes, experts, tmp_path):
    names = [f"class {n} of a very long name, and then some more of it" for n in range(classes)]
    g = torch.Generator().manual_seed(0)
    weights = {layer: torch.rand(24, experts, generator=g) for layer in ("first", "last")}
    found = RoutingWeights(tuple(names), torch.arange(24) % classes, torch.arange(24), weights)
    for path in (
        plot_mean_routing(found, tmp_path / "4.png", classes=names),
        plot_routing_spread(found, tmp_path / "5.png"),
        plot_top_classes(found, lambda n: torch.rand(4, 5), tmp_path / "6.png"),
        plot_weight_histogram(found, tmp_path / "7.png"),
    ):
        assert inked(path)


def test_figures_refuse_what_they_cannot_draw(known, tmp_path):
    for draw, message in [
        (lambda p: plot_mean_routing(known, p, classes=["owl"]), "no image of class 'owl'"),
        (lambda p: plot_mean_routing(known, p, classes=[]), "no class to draw"),
        (lambda p: plot_mean_routing(known, p, layers=[]), "no layer to draw"),
        (lambda p: plot_mean_routing(known, p, layers=["x"]), "no layer 'x'"),
        (lambda p: plot_routing_spread(known, p, layer="x"), "no layer 'x'"),
        (lambda p: plot_weight_histogram(known, p.with_suffix(".doc")), "suffix must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def run(*arguments):
    result = CliRunner().invoke(app, ["experts", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_a_folder(tmp_path):
    net = timm.create_model("cc_mobilenetv1_025_cifar", experts=3, begin=14, in_chans=1, routing="single")
    pliant.save(net, tmp_path / "net", input_size=(1, 16, 16))
    common = ("--data", "digits", "--device", "cpu", "--per-class", 4)
    printed = run(tmp_path / "net", *common, "--class", "3", "--class", "8")
    assert "classifier: 3 experts, routing of blocks.4.1; never above 0.01: none" in printed
    assert "40 images" in printed
    folder = tmp_path / "net" / "experts"
    assert {p.name for p in folder.iterdir()} == {WEIGHTS, ROWS, *FIGURES}
    found = RoutingWeights.load(folder / WEIGHTS)
    rows = list(csv.DictReader((folder / ROWS).open()))
    images = prepare(tmp_path / "net", "digits", device="cpu").images
    assert len(rows) == 10 * 3
    for row, expected in zip(rows, found.rows(), strict=True):
        assert (row["layer"], row["name"]) == (expected.layer, expected.name)
        assert int(row["expert"]) == expected.expert
        assert float(row["mean"]) == expected.mean
        assert row["best_image"] == images.where(int(row["best_example"]))
    assert "3 (4 images)" in (folder / "spread.svg").read_text()
    with pytest.raises(ValueError, match="no class 'ten'"):
        run(tmp_path / "net", *common, "--class", "ten", "--to", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_numbers_are_those_of_the_files_where_one_cannot_be_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (32, 32), (80 * n, 0, 0)).save(tmp_path / "data" / name / f"{n}.png")
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"no picture")
    net = timm.create_model("cc_mobilenetv1_025_cifar", experts=2, begin=14, num_classes=2)
    found = report_experts(net, tmp_path / "to", "folder", tmp_path / "data", device="cpu", workers=0)
    assert found.examples.tolist() == [0, 2, 3, 4, 5]
    assert found.classes == ("a", "b")
    rows = list(csv.DictReader((tmp_path / "to" / ROWS).open()))
    for row in rows:
        file = tmp_path / "data" / row["name"] / f"{int(row['best_example']) % 3}.png"
        assert row["best_image"] == str(file)


def test_a_run_brings_its_own_data(tmp_path):
    small = (
        "epochs=1",
        "pixels=8",
        "batch=256",
        "threads=1",
        "model_args.experts=2",
        "model_args.begin=14",
    )
    where = ("--folder", str(tmp_path / "run"), "--no-progress")
    result = CliRunner().invoke(cli.app, ["train", "digits.cc_mobilenetv1_025", *small, *where])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["data"] == "digits"
    assert "540 images" in run(tmp_path / "run", "--device", "cpu")
