"""Networks measured in the forms and engines that one names: rows, notes, files, the command."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from _engines import RUNTIMES, conv, use
from _measure import SMALL
from pliant import cli
from pliant.deploy.engines import ENGINES
from pliant.deploy.engines.eager import Eager
from pliant.measuring import latency
from pliant.measuring.candidates import fresh
from pliant.measuring.isolation import Isolated
from pliant.measuring.latency import NOT_FASTER, measure
from pliant.measuring.rows import (
    LOWER_RESOLUTION,
    Measurement,
    markdown_table,
    read_rows,
    write_rows,
)
from pliant.methods.mixture_of_depths.method import NO_BLOCKS


def test_forms_stand_beside_each_other(clock: SimpleNamespace) -> None:
    # Baseline, at 16 px, plain, optimized, without blocks.
    clock.times = lambda entrant, turn: (2.0, 1.5, 2.2, 1.1, 1.0)[entrant]
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        engines=["eager"],
        lower_resolution=16,
        rounds=2,
    )
    assert [(r.label, r.form) for r in rows] == [
        ("resnet20_cifar", "plain"),
        ("resnet20_cifar at 16 px", "plain"),
        ("resnet20_cifar_mod", "plain"),
        ("resnet20_cifar_mod, optimized", "optimized"),
        (f"resnet20_cifar_mod {NO_BLOCKS}", "plain"),
    ]
    assert rows[1].variant == LOWER_RESOLUTION
    assert [r.error for r in rows] == [""] * 5
    assert [r.tax for r in rows] == [None, None, pytest.approx(1.2), pytest.approx(0.1), None]
    assert [r.time_ratio for r in rows] == [1.0, 0.75, 1.1, 0.55, 0.5]
    assert [r.note for r in rows] == ["", "", NOT_FASTER, "", ""]
    assert [r.channels_last for r in rows] == [True] * 5
    assert [c[:2] for c in clock.calls if c[1] >= 0] == [(n, t) for t in (0, 1) for n in range(5)]
    # Counts are those of the network, not of what folding leaves of it.
    as_built = measure("resnet20_cifar_mod", rounds=1, tax=False)[0]
    assert as_built.form == "as built"
    assert [r.parameters for r in rows[2:4]] == [as_built.parameters] * 2
    assert [r.macs for r in rows[2:4]] == [as_built.macs] * 2


def test_every_network_is_equally_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spy(Eager):
        """Notes what it is handed: norms, layout of weights and images, size."""

        def __init__(self, name: str, by_pytorch: bool) -> None:
            self.name, self.by_pytorch, self.seen = name, by_pytorch, []

        def prepare(self, model: nn.Module, example: Tensor, **how: Any) -> Any:
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            tensors = [example, *(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))]
            last = {t.is_contiguous(memory_format=torch.channels_last) for t in tensors}
            self.seen.append((len(norms), last, example.shape[-1]))
            return super().prepare(model, example, **how)

    spies = Spy("spy", True), Spy("stranger", False)
    for spy in spies:
        monkeypatch.setitem(ENGINES, spy.name, spy)
    options: dict[str, Any] = {"against": "resnet20_cifar", "lower_resolution": 16, "rounds": 1}
    options |= {"min_run_time": 0}
    rows = measure("resnet20_cifar_mod", engines=["spy", "stranger"], **options)
    assert [(r.model, r.variant, r.form) for r in rows[:5]] == [
        ("resnet20_cifar", "network", "plain"),
        ("resnet20_cifar", LOWER_RESOLUTION, "plain"),
        ("resnet20_cifar_mod", "network", "plain"),
        ("resnet20_cifar_mod", "network", "optimized"),
        ("resnet20_cifar_mod", NO_BLOCKS, "plain"),
    ]
    assert [r.error for r in rows] == [""] * 10
    assert spies[0].seen == [(0, {True}, size) for size in (32, 16, 32, 32, 32)]
    # What is not PyTorch's gets folded norms, too, and its own layout.
    assert [(norms, size) for norms, _, size in spies[1].seen] == [(0, s) for s in (32, 16, 32, 32, 32)]
    assert all(False in last for _, last, _ in spies[1].seen)
    # As built, nothing is done to any of them.
    measure("resnet20_cifar_mod", engine="spy", **options)
    assert len(spies[0].seen) == 9
    assert all(norms > 0 and False in last for norms, last, _ in spies[0].seen[5:])


def test_blocks_without_a_fused_form_are_noted(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh("resnet20_cifar_mod", selection="first")
    rows = measure({"a": model}, engines=["eager"], rounds=1, tax=False)
    said = "blocks run in PyTorch's operators: its channels are not chosen by a learned selector"
    assert [r.note for r in rows] == ["", said]
    monkeypatch.setattr("pliant.methods.mixture_of_depths.ops.building._outcome", "no compiler")
    rows = measure("resnet20_cifar_mod", engines=["eager"], rounds=1, tax=False)
    assert [r.note for r in rows] == ["", "blocks run in PyTorch's operators: no compiler"]


def test_a_form_is_held_against_the_same_form(clock: SimpleNamespace) -> None:
    # As built and plain: baseline, network, network without blocks.
    clock.times = lambda entrant, turn: (2.0, 1.0, 3.0, 1.5, 2.0, 1.0)[entrant]
    forms = ("as built", "plain")
    rows = measure("resnet20_cifar_mod", against="resnet20_cifar", forms=forms, rounds=1)
    assert [(r.variant, r.form) for r in rows] == [
        (v, f) for v in ("network", "network", NO_BLOCKS) for f in forms
    ]
    assert [r.time_ratio for r in rows] == [1.0, 1.0, 1.5, 1.5, 1.0, 1.0]
    assert [r.tax for r in rows] == [None, None, 0.5, 0.5, None, None]
    with pytest.raises(
        ValueError, match="no form 'best'; the forms are as built, plain, optimized, native"
    ):
        measure("resnet20_cifar_mod", forms=["best"])


@pytest.mark.slow
def test_a_row_for_each_engine_batch_and_precision(
    clock: SimpleNamespace, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fakes.Fake()
    monkeypatch.setattr(type(fake), "precisions", ("float32",))
    name = use(fake, monkeypatch)
    written: list[str] = []
    write = Isolated.write
    monkeypatch.setattr(Isolated, "write", lambda s, *a: written.append(s.engine.name) or write(s, *a))
    told: list[tuple[int, int, str]] = []
    rows = measure(
        {"a": conv(), "b": conv()},
        against="a",
        input_size=SMALL,
        engines=["eager", name],
        batch=(1, 3),
        dtype=("float32", "bfloat16"),
        rounds=1,
        min_run_time=0,
        progress=lambda *t: told.append(t),
    )
    assert [(r.engine, r.dtype, r.batch, r.model) for r in rows] == [
        (e, d, b, m) for e in ("eager", name) for d in ("float32", "bfloat16") for b in (1, 3) for m in "ab"
    ]
    refused = f"bfloat16 is not supported by {name}, only {', '.join(ENGINES[name].precisions)}"
    assert [r.error for r in rows] == [""] * 12 + [refused] * 4
    assert [r.rounds for r in rows] == [1] * 12 + [0] * 4
    assert all(r.time_ratio is not None for r in rows[:12])
    assert len(written) == 2  # one file serves both batches
    assert told[-1] == (32, 32, "done")
    assert [t[0] for t in told] == sorted(t[0] for t in told)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aoti", "compile", *RUNTIMES])
def test_all_forms_are_measured(name: str) -> None:
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        engines=["eager", name],
        forms=["plain", "optimized"],
        batch=2,
        rounds=2,
        min_run_time=0,
        threads=1,
    )
    if any("compiler" in row.error for row in rows):
        pytest.skip("no C++ compiler on this machine")
    assert [r.error for r in rows] == [""] * 8
    assert all(r.median_ms is not None and r.median_ms > 0 for r in rows)
    assert [r.tax is not None for r in rows] == [False, True, True, False] * 2
    assert {r.runtime.partition(" ")[0] for r in rows} == {"", name if name in RUNTIMES else ""}
    assert [r.channels_last for r in rows] == [True] * 4 + [name not in RUNTIMES] * 4


ROW = Measurement(model="net", median_ms=1.0, form="optimized", runtime="onnxruntime 1.31.0")


def test_forms_and_runtimes_are_kept_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW])
    assert read_rows(path) == [ROW]
    text = markdown_table([ROW, Measurement(model="net", median_ms=2.0, form="plain")])
    assert "norms folded" in text
    assert "by onnxruntime 1.31.0" in text
    assert "| net, optimized |" in text
    assert "norms" not in markdown_table([Measurement(model="net", median_ms=2.0)])


def test_the_command_takes_engines_batches_and_forms(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.times = lambda entrant, turn: 1.0 + entrant % 3
    command = ["measure", "resnet20_cifar_mod", "--against", "resnet20_cifar", "--rounds", "2", "--no-tax"]
    command += ["--engines", "eager", "--batch", "1", "--batch", "2", "--rows", str(tmp_path / "rows.csv")]
    command += ["--html", str(tmp_path / "page.html"), "--markdown"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "rows.csv")
    assert [(r.batch, r.form) for r in rows] == [
        (b, f) for b in (1, 2) for f in ("plain", "plain", "optimized")
    ]
    assert done.output.count("| resnet20_cifar_mod, optimized |") == 2
    page = (tmp_path / "page.html").read_text()
    assert page.count("<td>resnet20_cifar_mod, optimized</td>") == 2
    assert "<h2>eager, batch 2, float32</h2>" in page
    assert f"{NOT_FASTER[0].upper()}{NOT_FASTER[1:]}: resnet20_cifar_mod (eager, batch 1, float32)" in page
    assert page.count("<svg") == 1
    assert ">converted, optimized<" in page  # the figure's legend

    # Rows of a run that is over are kept when the next takes the process down.
    runs = iter(range(1, 9))
    run = latency.run
    monkeypatch.setattr(latency, "run", lambda *a: sys.exit(9) if next(runs) == 2 else run(*a))
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 9
    assert [r.batch for r in read_rows(tmp_path / "rows.csv")] == [1, 1, 1, 2, 2, 2, 1, 1, 1]

    refused = CliRunner().invoke(cli.app, ["measure", "resnet20_cifar", "--engines", "eager,tvm"])
    assert str(refused.exception).startswith("no engine 'tvm'; the engines are eager, compile, aoti,")
    refused = CliRunner().invoke(cli.app, ["measure", "resnet20_cifar", "--forms", "best"])
    assert str(refused.exception) == "no form 'best'; the forms are as built, plain, optimized, native"
