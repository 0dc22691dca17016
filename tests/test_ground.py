"""The ground that everything stands on: packaging, set-up, documents, and their agreement."""

from __future__ import annotations

import ast
import csv
import importlib.metadata
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import pliant
from pliant.counting import count_macs, count_parameters
from pliant.methods.mixture_of_depths import without_mod_blocks
from pliant.models import list_networks
from research.published import PAPERS, markdown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TARGETS = ("help", "setup", "quickstart", "lint", "test", "test-all", "test-lowest", "bench")
TARGETS += ("gpu", "clean")
LONGEST = 450  # lines of a file of src
# Torch's own metadata fixes these, other versions for other torches.
OF_TORCH = ("nvidia-", "cuda-", "triton")


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git does not ignore; in an archive without it, those of the known folders."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing.returncode == 0:
        found = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        tops = ("src", "tests", "docs", "examples", "results", ".ci")
        found = [f for top in tops for f in (ROOT / top).rglob("*")] + list(ROOT.glob("*"))
    return tuple(f for f in found if f.is_file() and "__pycache__" not in f.parts)


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an image
        return ""


def documents() -> list[Path]:
    return sorted(f for f in tracked() if f.suffix == ".md")


def pins(path: str, python: str) -> dict[str, str]:
    """Name -> version that a constraints file fixes on one version of Python."""
    found = {}
    for line in (ROOT / path).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        assert not pin.url, line
        assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), line
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert canonicalize_name(pin.name) not in found, f"{pin.name} twice on Python {python}"
            found[canonicalize_name(pin.name)] = str(pin.specifier)[2:]
    return found


def requirements() -> list[Requirement]:
    """What pyproject.toml says is needed, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    return [r for r in map(Requirement, lines) if r.name != "pliant"]


def wanted(name: str, extras: frozenset[str], python: str, found: set[str]) -> None:
    """Add `name`, and what it needs in turn by the metadata installed here, to `found`."""
    key = canonicalize_name(name)
    if key in found:
        return
    found.add(key)
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return  # of another version of Python, or of another system
    for need in map(Requirement, lines):
        settings = [
            {"python_version": python, "python_full_version": f"{python}.1", "extra": e}
            for e in ("", *extras)
        ]
        if need.marker is None or any(need.marker.evaluate(s) for s in settings):
            wanted(need.name, frozenset(need.extras), python, found)


def test_constraints_pin_everything_that_is_installed():
    """On this Python; on another, other versions of packages need other packages."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pinned = pins("constraints.txt", python)
    installed = Version(importlib.metadata.version("torch")).base_version
    if installed != pinned["torch"]:
        pytest.skip(f"torch is {installed} here: these are not the versions of constraints.txt")
    needed: set[str] = set()
    for need in requirements():
        wanted(need.name, frozenset(need.extras), python, needed)
    needed = {name for name in needed if not name.startswith(OF_TORCH)}
    assert needed - pinned.keys() == set()
    assert {"torch", "numpy", "timm", "lightning", "pip", "setuptools"} <= pinned.keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_fit_the_ranges(python):
    pinned = pins("constraints.txt", python)
    for need in requirements():
        assert pinned[canonicalize_name(need.name)] in need.specifier, need


def test_the_lowest_constraints_are_the_floors_of_the_ranges():
    floors = pins("constraints-lowest.txt", "3.10")
    for need in requirements():
        named = {s.operator: s.version for s in need.specifier}
        floor = named.get(">=") or named["=="]
        assert floors[canonicalize_name(need.name)] in need.specifier, need
        assert floors[canonicalize_name(need.name)].startswith(floor), need


def test_every_third_party_import_of_the_package_is_a_dependency():
    modules = {"sklearn": "scikit-learn", "PIL": "pillow"}
    declared = {canonicalize_name(r.name) for r in requirements()}
    # In every version torchvision needs Pillow, and jinja2 MarkupSafe; torch brings triton where
    # there is one, and what imports it is imported on use.
    dependencies = {*declared, "pillow", "markupsafe", "triton"}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"pliant"}:
                assert canonicalize_name(modules.get(top, top)) in dependencies, f"{path}: {top}"


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pliant.__version__
    assert importlib.metadata.version("pliant") == pliant.__version__
    assert f"## {pliant.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "pliant._version.__version__" }' in project


def test_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    urls = [reference["url"] for reference in citation["references"]]
    for paper in ("2409.17016", "1904.04971", "2312.16392"):
        assert f"https://arxiv.org/abs/{paper}" in urls


def test_no_path_of_one_machine_and_no_registry_in_the_repository():
    # Put together here, so that this file does not hold them itself.
    tops = ("root", "work", "home/(?!someone/)", "Users", "opt/" + "py", "opt/" + "wheels")
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org", "find-" + "links"]
    places = [rf"(?<![\w.])/{top}" + ("" if top.startswith(("home", "opt")) else "/") for top in tops]
    pattern = re.compile("|".join(places + [re.escape(host) for host in hosts]))
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
        for path in tracked()
        for n, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_lock_file():
    locks = re.compile(r"(\.lock|lock\.(json|ya?ml|toml))$")
    assert [f for f in tracked() if locks.search(f.name)] == []


def test_files_of_the_package_are_short():
    lengths = {f.name: len(f.read_text().splitlines()) for f in (ROOT / "src").rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n >= LONGEST} == {}
    assert len(lengths) > 10


def _asserts(function: ast.AST, helpers: set[str]) -> bool:
    """Whether a function asserts, expects an exception, or calls a helper that asserts."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if called in helpers or called.startswith("assert_") or called in ("raises", "gradcheck"):
                return True
    return False


def test_every_test_asserts():
    mute = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        helpers: set[str] = set()
        for _ in range(3):  # helpers of helpers
            helpers |= {f.name for f in functions if _asserts(f, helpers)}
        tests = [f for f in functions if f.name.startswith("test")]
        mute += [f"{path.name}::{f.name}" for f in tests if f.name not in helpers]
        assert tests, f"{path.name} holds no test"
    assert mute == []


def test_makefile_has_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in TARGETS:
        assert re.search(rf"^{target}:.*## \S", makefile, re.M), target
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    assert set(phony[1].split()) == set(TARGETS)


def test_make_alone_prints_help():
    done = run("make", "--no-print-directory")
    assert done.returncode == 0
    assert tuple(re.findall(r"^make ([a-z-]+) ", done.stdout, re.M)) == TARGETS


def test_setup_names_a_python_that_is_not_there(tmp_path):
    done = run("make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'v'}")
    assert done.returncode != 0
    assert "There is no no-such-python here" in done.stderr
    assert not (tmp_path / "v").exists()


def test_setup_refuses_an_old_python(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.9.1; else exit 1; fi\n')
    old.chmod(0o755)
    done = run("make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'v'}")
    assert done.returncode != 0
    assert f"pliant needs Python 3.10 or newer, and {old} is Python 3.9.1" in done.stderr
    assert not (tmp_path / "v").exists()


def test_setup_says_when_venv_is_missing(tmp_path):
    bare = tmp_path / "python-bare"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    bare.chmod(0o755)
    done = run("make", "setup", f"PYTHON={bare}", f"VENV={tmp_path / 'v'}")
    assert done.returncode != 0
    assert "cannot make virtual environments" in done.stderr


def test_gpu_runs_every_step_and_fails_if_one_did(tmp_path):
    """With a Python whose second step fails: all are run, the status tells."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$3" != bench ]\n')
    python.chmod(0o755)
    done = run("make", "gpu", f"PYTHON={python}", "DATA=cifar")
    calls = (tmp_path / "calls").read_text().splitlines()
    trained = "path=cifar threads=1 workers=0 --device cuda --processes 8"
    assert calls[0] == "-c import xdist"
    assert calls[1].startswith("-m pytest -m gpu -n 8 --dist worksteal tests/")
    assert calls[2:] == [
        "-m pliant bench --device cuda --suite steps",
        "-m pliant bench --device cuda --suite mod",
        "-m pliant bench --device cuda --suite condconv",
        "-m pliant bench --device cuda --suite forms",
        "-m pliant costs",
        f"-m pliant experiment cifar10-controls --network resnet20 {trained}",
        f"-m pliant experiment cifar10-variants --seeds 1 {trained}",
        f"-m pliant experiment cifar10-variants --chosen 4 {trained}",
        "-m pliant experiment cifar10-controls --device cuda --network resnet20 --measure --engine eager",
        f"-m pliant experiment cifar10-controls --network resnet18 --network resnet50 {trained}",
    ]
    assert done.returncode != 0
    assert "bench --device cuda" in done.stderr
    assert "-m pytest" not in done.stderr


def test_gpu_tests_run_one_by_one_without_xdist(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != -c ]\n')
    python.chmod(0o755)
    done = run("make", "gpu", f"PYTHON={python}")
    assert done.returncode == 0
    assert (tmp_path / "calls").read_text().splitlines()[1].startswith("-m pytest -m gpu tests/")


@pytest.mark.parametrize(
    ("summary", "status"), [("12 passed, 3 skipped", 0), ("3 skipped", 1), ("no tests ran", 1)]
)
def test_ci_fails_when_no_test_ran(tmp_path, summary, status):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text(
        f"test:\n\t@echo 'All checks passed!'\n\t@echo '{summary} in 1.2s'\n"
    )
    done = run("bash", tmp_path / ".ci" / "run")
    assert done.returncode == status
    assert ("no test ran" in done.stderr) == bool(status)


def test_ci_fails_when_make_test_fails(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text("test:\n\t@echo '1 failed, 12 passed in 1.2s'; exit 1\n")
    done = run("bash", tmp_path / ".ci" / "run")
    assert done.returncode != 0


def test_local_links_of_the_documents_exist():
    broken = []
    for page in documents():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in documents()}


def test_make_targets_named_in_the_documents_exist():
    named = {t for page in documents() for t in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert named <= set(TARGETS)
    assert {"quickstart", "test"} <= named


def test_the_readme_has_the_marks_of_its_generated_table():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- quickstart:begin -->") == readme.count("<!-- quickstart:end -->") == 1
    assert readme.index("<!-- quickstart:begin -->") < readme.index("<!-- quickstart:end -->")


def networks_table() -> str:
    """The README's table of networks, counted."""
    lines = [
        "| network | parameters, M | MACs, G | MACs without its MoD blocks, G "
        "| plain network | parameters, M | MACs, G |",
        "|---|---|---|---|---|---|---|",
    ]
    converted = [name for name in list_networks() if name.endswith("_mod")]
    for name in sorted(converted, key=lambda n: ("_cifar" in n, int(re.findall(r"\d+", n)[0]))):
        size = (3, 32, 32) if "_cifar" in name else (3, 224, 224)
        plain = name.removesuffix("_mod")
        with torch.device("meta"):
            network = timm.create_model(name)
            other = timm.create_model(plain) if timm.is_model(plain) and plain != "resnet26" else None
        bare = f"{count_macs(without_mod_blocks(network), size) / 1e9:.4f}"
        cells = [f"`{name}`", *counts(network, size), bare]
        cells += ["", "", ""] if other is None else [f"`{plain}`", *counts(other, size)]
        lines.append(" | ".join(["", *cells, ""]).strip())
    return "\n".join(lines)


def counts(network: torch.nn.Module, size: tuple[int, int, int]) -> tuple[str, str]:
    return f"{count_parameters(network) / 1e6:.2f}", f"{count_macs(network, size) / 1e9:.4f}"


def test_the_readme_table_of_networks_is_what_is_counted():
    readme = (ROOT / "README.md").read_text()
    stated = readme.partition("<!-- networks:begin -->\n")[2].partition("\n<!-- networks:end -->")[0]
    assert stated == networks_table()


def condconv_table() -> str:
    """The table of CondConv networks on their page, counted."""
    lines = [
        "| network | parameters, M | MACs, G | plain network | parameters, M | MACs, G |",
        "|---|---|---|---|---|---|",
    ]
    for name in [name for name in list_networks() if name.startswith("cc_")]:
        size = (3, 32, 32) if "_cifar" in name else (3, 224, 224)
        plain = name.removeprefix("cc_").replace("mobilenetv1_", "mobilenetv1_w")
        with torch.device("meta"):
            cells = [f"`{name}`", *counts(timm.create_model(name), size)]
            cells += [f"`{plain}`", *counts(timm.create_model(plain), size)]
        lines.append(" | ".join(["", *cells, ""]).strip())
    return "\n".join(lines)


def test_the_table_of_condconv_networks_is_what_is_counted():
    page = (ROOT / "docs" / "condconv.md").read_text()
    stated = page.partition("<!-- networks:begin -->\n")[2].partition("\n<!-- networks:end -->")[0]
    assert stated == condconv_table()


COUNT_PAGES = {"mod": "mixture-of-depths.md", "condconv": "condconv.md", "adn": "adaptive-depth.md"}


def test_every_paper_has_a_page_for_its_counts():
    assert COUNT_PAGES.keys() == PAPERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", COUNT_PAGES)
def test_the_table_of_published_counts_is_what_is_counted(counts_of, method):
    if method == "mod":
        pytest.importorskip("ptflops")
    page = (ROOT / "docs" / COUNT_PAGES[method]).read_text()
    stated = page.partition("<!-- counts:begin -->\n")[2].partition("<!-- counts:end -->")[0]
    assert stated == markdown(counts_of(method))


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("condconv", "cifar10-condconv"),
        ("adaptive-depth", "cifar10-adn"),
        ("adaptive-depth", "cifar10-adn-specialized"),
    ],
)
def test_the_accuracies_of_a_page_are_those_of_the_rows(page, rows):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    table = text.partition("<!-- cifar10:begin -->")[2].partition("<!-- cifar10:end -->")[0]
    with (ROOT / "results" / f"{rows}.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) >= 3
    for s in scores:
        cells = (
            f"{float(s['test_accuracy']):.1f}",
            f"{float(s['val_accuracy']):.1f}",
            f"{float(s['train_ce']):.3f}",
            f"{int(s['parameters']):,}",
            f"{int(s['macs']) / 1e6:.2f} M",
        )
        assert f"| {' | '.join(cells)} |" in table, s["label"]


def test_the_accuracies_of_the_vision_transformer_are_those_of_the_rows():
    with (ROOT / "results" / "vit-adn.csv").open(newline="") as file:
        scores = {(s["data"], s["label"]): float(s["test_accuracy"]) for s in csv.DictReader(file)}
    text = (ROOT / "docs" / "adaptive-depth.md").read_text()
    for data in ("digits", "imagenet"):
        both = [scores[data, f"ADN, {end}-net"] for end in ("super", "base")]
        assert f"| {both[0]:.1f} | {both[1]:.1f} |" in text
