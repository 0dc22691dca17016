"""The questions that parts answer: what each method's parts say, and what a third party's do."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

import pliant
from pliant.counting import count_macs
from pliant.deploy.facts import read_report
from pliant.deploy.folding import fold_norms
from pliant.deploy.loading import open_export
from pliant.deploy.optimize import optimize, unfused
from pliant.measuring.candidates import controls_of
from pliant.measuring.rows import markdown_table
from pliant.method import Method, Site, Survey
from pliant.methods import METHODS
from pliant.parts import OnnxOperator, Part, Ranking, operators_of, parts, replace_parts
from pliant.surgery import conversions

SIZE = (3, 8, 8)


class Plain(Part):
    """A part that answers nothing special: y = 2 (W x + b)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return 2 * self.inner(x)


class Gate(Part):
    """A part that answers everything: y = (scale x + shift) of each channel, written awkwardly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.squares = False

    def forward(self, x):
        if self.squares:  # another way to the same, with a matrix product
            return torch.einsum("cd,bdhw->bchw", self.scale.diag(), x) + self.shift[:, None, None]
        return torch.stack([self.scale[n] * x[:, n] + self.shift[n] for n in range(x.shape[1])], 1)

    @contextmanager
    def counted(self):
        self.squares = True
        try:
            yield
        finally:
            self.squares = False

    def no_export(self) -> str:
        return "is closed: open it" if self.scale.sum() == 0 else ""

    def export_form(self, target, batch):
        return Exported(self)

    def fast_form(self):
        return Fast(self) if self.scale.sum() else "it is closed"

    def takes_norm(self, output) -> bool:
        return True

    def take_norm(self, scale, shift) -> None:
        with torch.no_grad():
            self.shift.copy_(self.shift * scale + shift)
            self.scale.mul_(scale)


class Exported(nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.scale, self.shift = gate.scale, gate.shift

    def forward(self, x):
        return x * self.scale[:, None, None] + self.shift[:, None, None]


class Fast(Part):
    inplace: bool = False

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.scale, self.shift = gate.scale, gate.shift

    def forward(self, x):
        y = x if self.inplace else x.clone()
        return y.mul_(self.scale[:, None, None]).add_(self.shift[:, None, None])


@dataclass(frozen=True, kw_only=True)
class Gates(Method):
    """A third party's method: a gate in each place."""

    kind: str = "Gate"

    def survey(self, model):
        return Survey(tuple(Site(path) for path, m in model.named_modules() if isinstance(m, nn.Identity)))

    def replace(self, module, site):
        return {"Gate": Gate, "Plain": Plain}[self.kind](4)

    def without(self, model):
        bare = copy.deepcopy(model)
        return replace_parts(
            bare, lambda _, part: nn.Identity() if isinstance(part, (Gate, Plain)) else None
        )


def network(kind: str = "Gate") -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(4, 5))
    nn.init.normal_(body[2].running_mean)
    nn.init.uniform_(body[2].running_var, 0.5, 2)
    model.pretrained_cfg = {"input_size": SIZE}
    return pliant.convert(model, Gates(kind=kind)).eval()


def same(found, model, x) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)


# --- a third party's part ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Gate", "Plain"])
def test_a_third_partys_part_is_folded_and_optimized(kind):
    model, x = network(kind), torch.randn(2, *SIZE)
    folded = fold_norms(model, x)
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(left) == (kind == "Plain")  # which takes no norm up
    same(folded, model, x)
    ready = optimize(model, x)
    assert unfused(ready) == {}
    assert unfused(model) == ({"0.1": ""} if kind == "Gate" else {})
    same(ready, model, x)
    if kind == "Gate":
        assert isinstance(ready[0][1], Fast)
        assert ready[0][1].inplace  # nobody else reads what the convolution wrote
        ready = optimize(model[0][1], torch.randn(2, 4, 3, 3))
        assert not ready.inplace  # it would change the caller's


def test_why_a_part_has_no_fast_form_is_told():
    model, x = network(), torch.randn(2, *SIZE)
    nn.init.zeros_(model[0][1].scale)
    assert unfused(optimize(model, x)) == {"0.1": "it is closed"}
    model[0][1].scale.data.fill_(1)
    model[0][1].register_forward_hook(lambda *_: None)
    assert unfused(optimize(model, x)) == {"0.1": "it has hooks, which another form would not run"}


@pytest.mark.parametrize("kind", ["Gate", "Plain"])
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_third_partys_part_is_exported(kind, ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
    model = network(kind)
    path = pliant.export(model, tmp_path / f"net{ending}", batches=(1, 2))
    assert read_report(path).parity.holds
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(open_export(path)(x), model(x).detach(), rtol=1e-4, atol=1e-5)


class Picker(Part):
    """Ranks channels by their means, and gives scores and numbers of the best two."""

    def forward(self, x):
        top, index = x.mean((2, 3)).topk(2, dim=1, sorted=True)
        return top.sigmoid(), index

    def ranking(self):
        def outcome(logits, channels):
            return logits.gather(1, channels).sigmoid(), channels

        return Ranking(2, False, lambda x: x.mean((2, 3)), outcome)


class Picked(Part):
    """The best two channels, each times its score."""

    def __init__(self) -> None:
        super().__init__()
        self.picker = Picker()

    def forward(self, x):
        scores, index = self.picker(x)
        where = index[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return x.gather(1, where) * scores[:, :, None, None]


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_what_a_third_partys_part_selects_is_compared(ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Picked(), nn.Conv2d(2, 5, 6), nn.Flatten()).eval()
    model.pretrained_cfg = {"input_size": SIZE}
    parity = read_report(pliant.export(model, tmp_path / f"net{ending}", batches=(1, 2))).parity
    assert (parity.images, parity.selections, parity.told, parity.holds) == (6, 6, True, True)


def test_a_part_that_no_file_can_hold_is_named(tmp_path):
    model = network()
    nn.init.zeros_(model[0][1].scale)
    with pytest.raises(ValueError, match=r"^0\.1 is closed: open it$"):
        pliant.export(model, tmp_path / "net.pt2")


def test_a_part_is_counted_as_it_says():
    model = network()
    convolution, product, classifier = 4 * 3 * 9 * 36, 4 * 4 * 36, 4 * 5
    assert count_macs(model, SIZE) == convolution + product + classifier
    assert not model[0][1].squares


@pytest.mark.parametrize("kind", ["Gate", "Plain"])
def test_a_third_partys_network_is_measured_with_its_control(kind, clock: SimpleNamespace):
    # Plain, optimized where there is such a form, and the control.
    times = [2.0, 1.5, 1.0] if kind == "Gate" else [2.0, 1.0]
    clock.times = lambda candidate, turn: times[candidate]
    rows = pliant.measure({"net": network(kind)}, engines=["eager"], rounds=2)
    assert [row.error for row in rows] == [""] * len(rows)
    forms = ["plain", "optimized"] if kind == "Gate" else ["plain"]
    assert [(r.label, r.form) for r in rows] == [
        *(("net, optimized" if form == "optimized" else "net", form) for form in forms),
        ("net without Gates", "plain"),
    ]
    assert [r.tax for r in rows] == [pytest.approx(t - 1) for t in times[:-1]] + [None]
    assert rows[-1].parameters == rows[0].parameters - sum(
        p.numel() for part in parts(network(kind)).values() for p in part.parameters()
    )


def test_a_part_that_fails_to_answer_costs_its_rows(clock: SimpleNamespace, monkeypatch):
    def no_answer(self):
        raise RuntimeError("no answer")

    monkeypatch.setattr(Gate, "fast_form", no_answer)
    rows = pliant.measure({"net": network(), "other": network("Plain")}, engines=["eager"], rounds=1)
    assert [(r.model, r.error) for r in rows] == [
        ("net", "RuntimeError: no answer"),
        ("other", ""),
        ("other", ""),
    ]


class First(Plain):
    operators = "first.library"

    def onnx_operator(self):
        return OnnxOperator("Any", {}, {})


class Second(First):
    operators = "second.library"


def test_a_compiled_file_has_operators_of_one_library():
    from pliant.deploy.onnx_native import take_parts

    with pytest.raises(ValueError, match=r"of one library, and this network's are of first\.library, sec"):
        take_parts(nn.Sequential(First(2), Second(2)))
    with pytest.raises(ValueError, match="none can: it has no part of such a method"):
        take_parts(nn.Sequential(Plain(2)))


# --- how parts are found and replaced ------------------------------------------------------------


class Around(Part):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain(2)

    def forward(self, x):
        return self.inner(x)


def test_parts_are_replaced_where_they_stand():
    model = nn.Sequential(Around(), Plain(2))
    assert list(parts(model)) == ["0", "0.inner", "1"]
    asked = []

    def form(path, part):
        asked.append(path)
        return nn.Identity() if path in ("0", "1") else None

    assert replace_parts(model, form) is model
    assert asked == ["0", "1"]  # what is inside the part that went is not asked for
    assert [type(m) for m in model] == [nn.Identity] * 2
    model = nn.Sequential(Around())
    replace_parts(model, lambda path, part: nn.Identity() if path == "0.inner" else None)
    assert isinstance(model[0].inner, nn.Identity)


def test_a_network_that_is_one_part():
    part = Plain(2)
    assert replace_parts(part, lambda path, part: None) is part
    assert isinstance(replace_parts(part, lambda path, part: nn.Identity()), nn.Identity)


# --- the contract: every method's parts answer every question ------------------------------------

NETWORKS = {
    "MixtureOfDepths": lambda: timm.create_model("resnet20_cifar_mod"),
    "CondConv": lambda: timm.create_model("cc_resnet20_cifar", experts=2),
    "AdaptiveDepth": lambda: timm.create_model("resnet20_cifar_adn"),
    "Subnet": lambda: pliant.subnet(timm.create_model("resnet20_cifar_adn"), (True, False, True)),
}


def test_every_method_is_held_to_the_contract():
    assert set(NETWORKS) == set(METHODS)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_part_answers_every_question(name):
    model = NETWORKS[name]().eval()
    assert METHODS[name] in {type(c.method) for c in conversions(model)}
    assert parts(model)
    x = torch.randn(1, 3, 32, 32)
    folded = fold_norms(model, x)
    for part in (*parts(model).values(), *parts(folded).values()):
        with part.counted():
            pass
        assert isinstance(part.no_export(), str)
        assert isinstance(part.switches, bool)
        for target in ("program", "onnx", "openvino"):
            for batch in (None, 1):
                assert isinstance(part.export_form(target, batch), nn.Module)
        form = part.fast_form()
        assert form is None or isinstance(form, (str, nn.Module))
        operator = part.onnx_operator()
        assert operator is None or isinstance(operator, (str, OnnxOperator))
        assert not isinstance(operator, OnnxOperator) or part.operators
        ranking = part.ranking()
        assert ranking is None or isinstance(ranking, Ranking)
        assert isinstance(part.takes_norm(torch.zeros(1, 4, 3, 3)), bool)
    for native in operators_of(model):
        assert isinstance(native.why_not(), str)
        assert callable(native.ready)
        assert callable(native.onnx_library)


class Door(Part):
    """An activation, as a second method puts it in."""

    def forward(self, x):
        return x.relu()


@dataclass(frozen=True, kw_only=True)
class Doors(Method):
    """A second method: a door for each activation."""

    def survey(self, model):
        return Survey(tuple(Site(path) for path, m in model.named_modules() if isinstance(m, nn.ReLU)))

    def replace(self, module, site):
        return Door()

    def without(self, model):
        bare = copy.deepcopy(model)
        return replace_parts(bare, lambda _, part: nn.ReLU() if isinstance(part, Door) else None)


def test_the_controls_of_two_methods_are_both_timed():
    model = pliant.convert(network(), Doors())
    rows = pliant.measure({"both": model}, rounds=1, min_run_time=0, threads=1)
    assert [(row.variant, row.error) for row in rows] == [
        ("network", ""),
        ("without Gates", ""),
        ("without Doors", ""),
    ]
    assert rows[0].tax == pytest.approx(rows[0].median_ms / rows[1].median_ms - 1, abs=1e-3)
    assert markdown_table(rows).splitlines()[0].endswith("tax: time over that without Gates")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_control_is_a_network_without_the_method(name):
    model = NETWORKS[name]().eval()
    assert bool(controls_of(model)) == (name == "MixtureOfDepths")
    for conversion in conversions(model):
        assert conversion.method.without_label.startswith("without ")
        bare = conversion.method.without(model)
        if bare is not None:
            x = torch.randn(2, 3, 32, 32)
            assert bare is not model
            assert sum(p.numel() for p in bare.parameters()) < sum(p.numel() for p in model.parameters())
            assert bare(x).shape == model(x).shape
            assert conversion.method.without(bare) is None  # nothing is left of it
