"""The quickstart, whole, on the smallest networks that show all of it."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
from rich.console import Console

from pliant.measuring.rows import Measurement, read_rows
from pliant.methods.mixture_of_depths.recipes import CONTROLS as MOD_CONTROLS
from pliant.tables import WHY_UNDECIDED
from research import quickstart as module
from research.quickstart import BEGIN, END, quickstart


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run of the quickstart: its folder, what it printed, and the README it filled."""
    folder = tmp_path_factory.mktemp("quickstart")
    readme = folder / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    with (folder / "printed.txt").open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DIGITS_SECONDS", 0.0)
        patch.setattr(module, "LARGE_SECONDS", 0.0)
        patch.setattr(module, "LOWER_PIXELS", 16)
        page = quickstart(
            folder / "out",
            changes=["model_args.channels=(8, 8, 8, 8)", "epochs=1", "pixels=8", "batch=256"],
            large=("resnet20_cifar", "resnet20_cifar_mod"),
            threads=1,
            readme=readme,
            results=folder / "results",
            console=Console(file=file, width=200),
        )
    return folder, page, (folder / "printed.txt").read_text()


def test_every_network_is_trained_timed_and_in_the_table(done):
    folder, _, printed = done
    scores = list(csv.DictReader((folder / "out" / "scores.csv").open()))
    depths = [f"ADN, {depth}" for depth in ("super-net", "FFFT", "FFTT", "FTTT", "base-net")]
    labels = ["plain", *MOD_CONTROLS, "CondConv, 4 experts", *depths]
    assert [row["label"] for row in scores] == labels
    rows = read_rows(folder / "out" / "latency.csv")
    assert [row.label for row in rows[: len(labels)]] == labels
    assert [row.label for row in rows[len(labels) :]] == [
        "resnet20_cifar",
        "resnet20_cifar at 16 px",
        "resnet20_cifar_mod",
        "resnet20_cifar_mod without MoD blocks",
    ]
    for row, score in zip(rows, scores, strict=False):
        assert row.accuracy == pytest.approx(float(score["test_accuracy"]) / 100, abs=1e-6)
        assert row.threads == 1
        assert row.median_ms > 0
    assert rows[len(labels) + 2].tax is not None
    for label in labels:
        assert label in printed.partition("Timing")[2]


def test_rows_are_kept_as_results_too(done):
    folder, _, _ = done
    for name in ("scores", "latency"):
        kept = (folder / "results" / f"quickstart-{name}.csv").read_bytes()
        assert kept == (folder / "out" / f"{name}.csv").read_bytes()


def test_page_has_table_curves_plots_and_selections(done):
    _, page, _ = done
    text = page.read_text()
    assert text.count("<svg") == 4
    for words in (
        "What each costs and scores",
        "What is selected",
        "Which channels are selected",
        "threads",
        "commit",
    ):
        assert words in text


@pytest.mark.parametrize(("spread", "said"), [(0.01, "MoD tax"), (0.5, WHY_UNDECIDED)])
def test_a_finding_of_times_needs_times_that_decide(spread, said):
    score = SimpleNamespace(test_accuracy=0.9, label="plain")
    timed = {
        "model": "resnet20_cifar_mod",
        "against": "resnet20_cifar",
        "time_ratio": 0.8,
        "mac_ratio": 0.65,
    }
    row = Measurement(**timed, tax=0.1, tax_iqr=spread)
    assert said in module._findings([score], [row])[-1]


def test_readme_gets_the_table_between_its_marks(done):
    folder, _, _ = done
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| MoD, score order |" in text


def test_a_readme_without_marks_is_refused(tmp_path, done):
    plain = tmp_path / "plain.md"
    plain.write_text("nothing here")
    with pytest.raises(ValueError, match="has no part between"):
        module._into_readme(plain, [])
    assert plain.read_text() == "nothing here"
