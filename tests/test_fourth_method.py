"""A fourth method by nothing but the recipe in CONTRIBUTING: one file, one registration.

The file is taken from the page, laid beside an entry point as an installed package has one, and
everything that the page promises runs in one process that finds it there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pliant import AdaptiveDepth, methods
from pliant.method import Method
from pliant.methods import METHODS
from pliant.models import PLAIN_NETWORKS

ROOT = Path(__file__).resolve().parents[1]

# What a user does, in the order of the page; each part prints what it found.
SCRIPT = """
import json, sys
import timm, torch, pliant

def told(name, **found):
    print(json.dumps({"part": name, **found}), flush=True)

def gated(network):
    return sum(type(m).__name__ == "ExcitedBlock" for m in network.modules())

torch.set_num_threads(1)
torch.manual_seed(0)
assert "squeeze_excite" not in sys.modules
model = timm.create_model("resnet20_cifar_se", reduction=4, num_classes=5).eval()
told("named", blocks=gated(model))

from squeeze_excite import SqueezeExcite

plain = timm.create_model("resnet20_cifar", num_classes=5).eval()
plan = pliant.plan(plain, SqueezeExcite(reduction=4))
told("plan", rows=len(plan.replacements), parameters=plan.parameters)
converted = pliant.convert(plain, SqueezeExcite(reduction=4))
told("convert", keys=list(converted.state_dict()) == list(model.state_dict()))

x = torch.randn(2, 3, 32, 32)
for name, network in (("named", model), ("converted", converted)):
    again = pliant.load(pliant.save(network, f"{name}.folder"))
    with torch.no_grad():
        told(f"saved {name}", equal=torch.equal(again(x), network(x)))

for suffix in ("pt2", "onnx"):
    pliant.export(model, f"net.{suffix}", x)
    with torch.no_grad():
        told(suffix, apart=(pliant.open_export(f"net.{suffix}")(x) - model(x)).abs().max().item())

fast = pliant.optimize(model, x)
with torch.no_grad():
    told("optimize", apart=(fast(x) - model(x)).abs().max().item(),
         norms=sum(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules()))

rows = pliant.measure("resnet20_cifar_se", against="resnet20_cifar", rounds=3, min_run_time=0)
told("measure", labels=[row.label for row in rows], failed=[row.error for row in rows if row.error])

from pliant.recipes import get_recipe, list_recipes
told("recipes", listed="digits.resnet20_se" in list_recipes(), model=get_recipe("digits.resnet20_se").model)

from pliant.compare import compare, controls_by_name
changes = ["epochs=1", "warmup=0", "pixels=8", "batch=256", "accelerator=cpu"]
scores = compare(controls_by_name("digits.resnet20", changes, "se"), "runs", progress=False)
told("compare", models={label: score.model for label, (score, _) in scores.items()})

both = pliant.convert(model, pliant.AdaptiveDepth()).eval()
cut = pliant.subnet(both, "TTT")
with torch.no_grad(), pliant.at_depth(both, "TTT"):
    told("adaptive", equal=torch.equal(both(x), cut(x)), blocks=gated(cut))
"""


def of_the_page(language: str) -> str:
    """The block of code that CONTRIBUTING has in a language."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(rf"^ *```{language}\n(.*?)^ *```$", page, re.M | re.S)
    return str(block)


def install(folder: Path, points: str, name: str = "squeeze-excite") -> None:
    """Lay a distribution with entry points into `folder`, as pip does."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What each part of the script printed, by its name."""
    folder = tmp_path_factory.mktemp("fourth")
    (folder / "site" / "x").mkdir(parents=True)
    (folder / "site" / "squeeze_excite.py").write_text(of_the_page("python"))
    toml = of_the_page("toml")
    point = re.search(r'^ *\[project\.entry-points\."([\w.]+)"\]\n *(\w+) = "([\w.:]+)"', toml, re.M)
    assert point is not None
    install(folder / "site", f"[{point[1]}]\n{point[2]} = {point[3]}\n")
    path = os.pathsep.join([str(folder / "site"), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("part"): line for line in lines}


def test_it_is_planned_converted_and_built_by_name(found):
    assert found["named"] == {"blocks": 9}
    before, after = found["plan"]["parameters"]
    # Per block of C channels: two layers of C * C/4 weights, biases of C/4 and C.
    assert after - before == sum(3 * (2 * c * (c // 4) + c // 4 + c) for c in (16, 32, 64))
    assert found["plan"]["rows"] == 9
    assert found["convert"]["keys"]


def test_it_is_saved_and_loaded_bit_by_bit(found):
    assert found["saved named"]["equal"]
    assert found["saved converted"]["equal"]


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_exported_files_compute_the_same(found, suffix):
    assert found[suffix]["apart"] < 1e-5


def test_it_is_optimised(found):
    assert found["optimize"]["apart"] < 1e-5
    assert found["optimize"]["norms"] == 0


def test_it_is_timed_beside_its_control(found):
    labels = found["measure"]["labels"]
    assert labels == ["resnet20_cifar", "resnet20_cifar_se", "resnet20_cifar_se without SqueezeExcite"]
    assert found["measure"]["failed"] == []


def test_it_has_recipes_and_is_compared_with_the_plain_network(found):
    assert found["recipes"] == {"listed": True, "model": "resnet20_cifar_se"}
    assert found["compare"]["models"] == {"plain": "resnet20_cifar", "SqueezeExcite": "resnet20_cifar_se"}


def test_adaptive_depth_goes_around_it(found):
    assert found["adaptive"] == {"equal": True, "blocks": 6}


def test_every_plain_network_has_a_name_but_where_it_is_taken(monkeypatch):
    names = []
    monkeypatch.setattr(methods, "register", lambda _module, name, _plain, **_: names.append(name))
    methods._name_networks("{}_gate".format, tuple)
    assert names == [f"{base}_gate" for base in PLAIN_NETWORKS]
    names.clear()
    methods._name_networks("{}_mod".format, tuple)  # Mixture-of-Depths has those of all ResNets
    assert {name.partition("_")[0] for name in names} == {"mobilenetv1", "mobilenetv2", "vit"}


# --- what is refused ----------------------------------------------------------------------------


class Fake(Method):
    """A method of another package."""

    suffix = "mod"
    survey = replace = None


class Clash(Fake):
    suffix = "clash"


Clash.__name__ = "CondConv"


@pytest.fixture
def points(monkeypatch, tmp_path):
    """Pretend that a package has entry points: suffix and object of each."""

    def pretend(**named):
        monkeypatch.setattr(EntryPoint, "load", lambda self: named[self.name])
        made = tuple(EntryPoint(name, f"theirs:{name}", methods.GROUP) for name in named)
        monkeypatch.setattr(methods, "entry_points", lambda group: made)

    methods._others.cache_clear()
    yield pretend
    methods._others.cache_clear()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"mod": Fake},
            "'theirs:mod' of an unknown package brings a method of the suffix 'mod', which pliant has",
        ),
        ({"clash": Clash}, "brings a second method named CondConv; rename the class"),
        (
            {"other": Fake},
            "the entry point's name 'other' and the suffix 'mod' of Fake have to be one word",
        ),
        ({"other": dict}, "is <class 'dict'>; it has to name a subclass of pliant.Method"),
    ],
)
def test_a_clash_of_names_is_refused(points, named, message):
    points(**named)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(METHODS)
    assert METHODS["AdaptiveDepth"] is AdaptiveDepth  # which somebody's package does not spoil


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('no such luck')\n")
    install(tmp_path, "[pliant.methods]\nbroken = broken_one:Method\n", name="broken-one")
    monkeypatch.syspath_prepend(tmp_path)
    methods._others.cache_clear()
    with pytest.raises(
        ImportError, match=r"'broken_one:Method' of broken-one 1\.0 cannot be loaded: no such luck"
    ):
        list(METHODS)
    methods._others.cache_clear()
