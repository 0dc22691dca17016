"""The examples run, as they stand, and print what they should; the README shows one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pliant

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_example(tmp_path):
    """Run an example by name in an empty folder, as a user would; gives what it prints."""

    def run(name: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(EXAMPLES / name)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_convert_your_network(run_example, tmp_path):
    printed = run_example("convert_your_network.py")
    lines = printed.splitlines()
    assert lines[0].startswith("layer1.1: Bottleneck -> MoDBlock (C=256, c=64, k=4")
    assert sum("Bottleneck -> MoDBlock" in line for line in lines) == 7
    # 18,105,949 of the network with 1000 classes, less 990 * 2049 of its classifier.
    assert "parameters: 23,528,522 -> 16,077,439 (68.3%)" in lines
    assert lines[-1] == "16,077,439 parameters in resnet50-mod"
    files = sorted(f.name for f in (tmp_path / "resnet50-mod").iterdir())
    assert files == ["config.json", "model.safetensors"]


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
    assert [name for name in names if f'run_example("{name}")' not in tested] == []


def test_the_readme_shows_the_example():
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", readme, re.S)
    assert shown is not None
    assert shown[1] == (EXAMPLES / "convert_your_network.py").read_text()
