"""The documents: their links and tables agree with the code and the rows."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

import pliant
from _repository import ROOT, tracked
from pliant.counting import count_macs, count_parameters
from pliant.measuring.rows import read_rows
from pliant.methods.mixture_of_depths import without_mod_blocks
from pliant.models import list_networks
from pliant.tables import with_spread
from research.published import PAPERS, markdown

# Pages that programs write whole; the others are at most so many lines.
GENERATED = {"coverage.md", "evidence.md", "variants.md", "published-counts.md"}
LONGEST = 200
# Written by `make docs`, before it builds the site.
MADE = {"reference/commands.md"}
# Marks between which programs write a table: of the speed tables, and of the quickstart.
TABLES = {"docs/mod-tax.md": "speed", "docs/how-to/reproduce.md": "quickstart"}


def documents() -> list[Path]:
    return sorted(f for f in tracked() if f.suffix == ".md" and "golden" not in f.parts)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text) if "://" not in target]


def test_local_links_of_the_documents_lead_somewhere():
    broken = []
    for page in documents():
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in documents()}


def test_every_page_is_in_the_navigation_of_the_site():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = {f.relative_to(ROOT / "docs").as_posix() for f in documents() if f.is_relative_to(ROOT / "docs")}
    beside = {f.relative_to(ROOT).as_posix() for f in documents() if f.parent.name == "results"}
    beside |= {"CONTRIBUTING.md", "CHANGELOG.md"}
    assert sorted(named) == sorted(docs | MADE | beside)


def test_the_reference_has_every_public_name():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: pliant\.(\w+)$", pages, re.M))
    assert named == {*pliant.__all__} - {"__version__"}


def test_pages_are_short():
    lengths = {
        page.relative_to(ROOT).as_posix(): len(page.read_text().splitlines())
        for page in documents()
        if page.parent.name != "results" and page.name not in GENERATED
    }
    assert {page: lines for page, lines in lengths.items() if lines > LONGEST} == {}
    assert len(lengths) > 20


def test_make_targets_named_in_the_documents_exist():
    named = {t for page in documents() for t in re.findall(r"[`$] ?make ([a-z-]+)", page.read_text())}
    assert named <= set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert {"quickstart", "test", "docs"} <= named


@pytest.mark.parametrize(("page", "mark"), TABLES.items())
def test_a_page_has_the_marks_of_its_generated_table(page, mark):
    text = (ROOT / page).read_text()
    assert text.count(f"<!-- {mark}:begin -->") == text.count(f"<!-- {mark}:end -->") == 1
    assert text.index(f"<!-- {mark}:begin -->") < text.index(f"<!-- {mark}:end -->")


def networks_table() -> str:
    """The table of Mixture-of-Depths networks on their page, counted."""
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


@pytest.mark.slow
def test_the_table_of_mod_networks_is_what_is_counted():
    page = (ROOT / "docs" / "mixture-of-depths.md").read_text()
    stated = page.partition("<!-- networks:begin -->\n")[2].partition("\n<!-- networks:end -->")[0]
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


@pytest.mark.slow
def test_the_table_of_condconv_networks_is_what_is_counted():
    page = (ROOT / "docs" / "condconv.md").read_text()
    stated = page.partition("<!-- networks:begin -->\n")[2].partition("\n<!-- networks:end -->")[0]
    assert stated == condconv_table()


@pytest.mark.slow
@pytest.mark.parametrize("method", PAPERS)
def test_the_table_of_published_counts_is_what_is_counted(counts_of, method):
    if method == "mod":
        pytest.importorskip("ptflops")
    page = (ROOT / "docs" / "published-counts.md").read_text()
    _, _, rest = page.partition(f"<!-- counts-{method}:begin -->\n")
    stated, _, _ = rest.partition(f"<!-- counts-{method}:end -->")
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


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_of_the_readme_are_those_of_the_rows():
    readme = " ".join((ROOT / "README.md").read_text().split())
    depths = {row["variant"]: row for row in rows_of("depths-cpu")}
    full, least = depths["depth FFF"], depths["depth TTT"]
    plain = next(r for r in rows_of("cifar10-adn-specialized") if r["label"] == "plain")
    share = float(least["median_ms"]) / float(full["median_ms"])
    work = int(least["macs"]) / int(full["macs"])
    assert f"depth it scores {float(full['accuracy']):.1f} %;" in readme
    assert f"by the same recipe, scores {float(plain['test_accuracy']):.1f} %" in readme
    told = f"it takes {share:.2f} of the time for {work:.2f} of the MACs"
    assert f"{told} and scores {float(least['accuracy']):.1f} %" in readme
    speed = {
        (r["engine"], r["model"], r["variant"], r["form"]): 1 / float(r["time_ratio"])
        for r in rows_of("latency-cpu")
        if r["batch"] == "1" and r["time_ratio"]
    }
    eager = speed["eager", "resnet50_mod", "network", "optimized"]
    native = speed["onnxruntime", "resnet50_mod", "network", "native"]
    smaller = [speed[e, "resnet50", "lower resolution", "plain"] for e in ("eager", "onnxruntime")]
    assert f"{eager:.2f} times in eager PyTorch and {native:.2f} times in ONNX Runtime" in readme
    assert f"176 pixels is {smaller[0]:.2f} and {smaller[1]:.2f} times as fast" in readme
    counted = (ROOT / "docs" / "published-counts.md").read_text()
    for paper, name in (("mod", "Mixture-of-Depths"), ("condconv", "CondConv"), ("adn", "adaptive depth")):
        table = counted.partition(f"counts-{paper}:begin")[2].partition(f"counts-{paper}:end")[0]
        match, differs = (table.count(f"| {verdict} |") for verdict in ("match", "differs"))
        found = re.search(rf"(\d+) of (\d+) (rows )?of {name}", readme)
        assert found is not None
        assert found.groups()[:2] == (str(match), str(match + differs))


def test_the_table_of_recovery_is_that_of_the_rows():
    page = (ROOT / "docs" / "how-to" / "recover.md").read_text()
    found: dict[str, dict[str, list[str]]] = {"test_accuracy": {}, "test_accuracy_base": {}}
    for row in rows_of("cifar10-recover"):
        if row["epoch"] in ("0", row["epochs"]) and "20" in row["model"]:
            network = row["model"] + "selection" * ("selection" in row["model_args"])
            for column, cells in found.items():
                if row[column]:
                    cells.setdefault(network, []).append(f"{float(row[column]):.2f}")
    for cells in found.values():
        for before, taught, _, alone in cells.values():
            assert f"| {before} | {taught} | {alone} |" in page
    assert [len(cells) for cells in found.values()] == [4, 1]


def test_the_times_of_condconv_in_engines_are_those_of_the_rows():
    engines = {
        "eager": "eager",
        "compile": "`torch.compile`",
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
    }
    forms = {"plain": "as PyTorch exports it", "optimized": "`pliant.export`", "native": "`compiled=True`"}
    places = [(n, b) for n in ("cc_mobilenetv1_050", "cc_mobilenetv2_100") for b in (1, 32)]
    page = (ROOT / "docs" / "condconv.md").read_text()
    table = page.partition("<!-- engines:begin -->\n")[2].partition("\n<!-- engines:end -->")[0]
    _, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    stated = {
        (label, *place): cell for label, *cells in lines for place, cell in zip(places, cells, strict=True)
    }
    for row in read_rows(ROOT / "results" / "condconv-engines-cpu.csv"):
        network, _, active = row.model.partition(" experts=8")
        files = row.engine in ("onnxruntime", "openvino")
        if row.model == row.against or (files and active and row.form == "plain"):
            continue
        label = [engines[row.engine], *[forms[row.form]] * files, *[f"`{active.strip()}`"] * bool(active)]
        told = with_spread(row.time_ratio, row.time_ratio_iqr, 2) if row.time_ratio else "not measured"
        assert stated.pop((", ".join(label), network, row.batch)) == told
    assert set(stated.values()) <= {"not measured"}
