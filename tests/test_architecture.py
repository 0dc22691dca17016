"""The layers that docs/design.md draws: imports run downwards, and never in a circle.

Imports within functions count, and so do those for type checkers alone (but not in a circle: a
form may name the type of what it is made of).
"""

from __future__ import annotations

import grimp
import pytest

# Top to bottom. What stands in none of them is the ground, at the very bottom.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("adaptive", "compare"),
    ("recipes",),
    ("train",),
    ("measuring",),
    ("deploy",),
    ("checkpoint",),
    ("methods",),
    ("models",),
)
# These ask the methods (`pliant.method.Method`, `pliant.parts.Part`) and name none.
ASKING = ("checkpoint", "compare", "deploy", "measuring", "models", "recipes", "train")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("pliant", "research", exclude_type_checking_imports=False, cache_dir=None)


def test_imports_run_downwards(graph):
    named = {name for layer in LAYERS for name in layer}
    ground = {name.removeprefix("pliant.") for name in graph.find_children("pliant")} - named
    assert named.isdisjoint(ground)
    assert {"surgery", "parts", "counting", "anatomy"} <= ground
    layers = [grimp.Layer(*layer, independent=True) for layer in LAYERS]
    layers.append(grimp.Layer(*ground, independent=False))
    illegal = graph.find_illegal_dependencies_for_layers(layers=layers, containers={"pliant"})
    assert {(found.importer, found.imported) for found in illegal} == set()


def test_no_module_imports_itself_by_way_of_others():
    graph = grimp.build_graph("pliant", "research", exclude_type_checking_imports=True, cache_dir=None)
    circles = [
        chain
        for module in sorted(graph.modules)
        for other in sorted(graph.find_modules_directly_imported_by(module))
        if (chain := graph.find_shortest_chain(other, module))
    ]
    assert circles == []


def test_who_asks_the_methods_names_none(graph):
    named = [
        (module, imported)
        for part in ASKING
        for module in sorted({f"pliant.{part}", *graph.find_descendants(f"pliant.{part}")})
        for imported in sorted(graph.find_modules_directly_imported_by(module))
        if imported.startswith("pliant.methods.")
    ]
    assert named == []


def test_nobody_imports_research_and_nothing_below_the_commands_the_public_names(graph):
    ours = {m for m in graph.modules if m.startswith("pliant.")}
    public = graph.find_modules_that_directly_import("pliant") & ours
    above = ("pliant.__main__", "pliant.cli", "pliant.commands")
    assert {m for m in public if not m.startswith(above)} == set()
    research = {m for m in graph.modules if m.split(".")[0] == "research"}
    assert {m for m in ours if graph.find_modules_directly_imported_by(m) & research} == set()
