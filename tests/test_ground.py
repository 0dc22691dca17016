"""The documents: their links and tables agree with the code and the rows."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import timm
import torch

from _repository import ROOT, tracked
from pliant.counting import count_macs, count_parameters
from pliant.methods.mixture_of_depths import without_mod_blocks
from pliant.models import list_networks
from research.published import PAPERS, markdown


def documents() -> list[Path]:
    return sorted(f for f in tracked() if f.suffix == ".md")


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
    assert named <= set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
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
