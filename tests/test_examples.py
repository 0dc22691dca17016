"""The examples run, as they stand, and print what they should; the README shows two of them."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

import pliant

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run an example by name as a script, in an empty folder; gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str | Path) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return printed.getvalue()

    return run


def test_convert_your_network(run_example, tmp_path):
    assert run_example("convert_your_network.py") == block_of_readme("example", "text")
    files = sorted(f.name for f in (tmp_path / "resnet50-adaptive").iterdir())
    assert files == ["config.json", "model.safetensors"]


def test_pick_a_depth(tmp_path, run_example):
    """With a budget that any machine keeps: the times of a test are nobody's claim."""
    code = (EXAMPLES / "pick_a_depth.py").read_text()
    small = code.replace("budget_ms=20", "budget_ms=1e6").replace("160, 160", "32, 32")
    small = small.replace("threads=1)", "threads=1, rounds=1, min_run_time=0)")
    assert small.count("1e6") == small.count("rounds=1") == small.count("32, 32") == 1
    (tmp_path / "small.py").write_text(small)
    printed = run_example(tmp_path / "small.py")
    form = r"(depth [TF]{4}: [\d.]+ ms, [\d.]+ G MACs\n)+chosen: \((True|False)(, (True|False)){3}\)\n"
    assert re.fullmatch(form, printed)
    assert re.fullmatch(form, block_of_readme("depth", "text"))
    assert "chosen: (False, False, False, False)" in printed, "the most MACs that fit"


def test_train_digits(run_example, tmp_path):
    printed = run_example("train_digits.py")
    found = re.search(r"resnet18_cifar_mod: ([\d.]+)% validation, ([\d.]+)% test accuracy", printed)
    assert found is not None, printed
    assert min(map(float, found.groups())) > 20  # chance is 10 %
    assert "1 epoch, " in printed
    network = pliant.load(tmp_path / "digits-resnet18-mod" / "best")
    assert network.num_classes == 10


def test_upcycle_a_trained_network(run_example, tmp_path):
    lines = run_example("upcycle_a_trained_network.py").splitlines()
    assert lines[0].startswith("layer2.0: BasicBlock -> CondConvBlock (unit=5, kind=block, experts=4")
    # Kernels of layers 2 and 3 four times, the classifier's too, and seven routers.
    assert "parameters: 269,722 -> 1,033,206 (383.1%)" in lines
    name, difference = lines[-1].split(":")
    assert name == "largest difference"
    assert float(difference) < 1e-4
    assert (tmp_path / "resnet20-experts" / "model.safetensors").is_file()


def test_serve_with_a_deadline(run_example, tmp_path):
    printed = run_example("serve_with_a_deadline.py")
    share = {int(n): int(p) for n, p in re.findall(r"(\d+) images a burst: (\d+) %", printed)}
    assert list(share) == [4, 8, 11]
    assert 30 <= share[11] <= share[8] < share[4] <= 100, "more images, less depth"
    assert re.search(r"deadline of [\d.]+ ms kept by \d+ of 60 bursts", printed)
    assert (tmp_path / "serve_with_a_deadline.png").stat().st_size > 10_000


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    names = [f.name for f in EXAMPLES.glob("*.py")]
    assert names
    assert [name for name in names if f'"{name}")' not in tested] == []


@pytest.mark.parametrize(
    ("mark", "name"), [("example", "convert_your_network.py"), ("depth", "pick_a_depth.py")]
)
def test_the_readme_shows_the_example(mark, name):
    _, _, code = (EXAMPLES / name).read_text().partition('"""\n\n')
    assert block_of_readme(mark, "python") == code


def block_of_readme(mark: str, language: str) -> str:
    """What stands in the README between marks, in its block of this language."""
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition(f"<!-- {mark}:begin -->")[2].partition(f"<!-- {mark}:end -->")[0]
    return shown.partition(f"```{language}\n")[2].partition("```\n")[0]
