"""`python -m pliant.timm` runs a script that knows timm alone, with pliant's networks among timm's."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from helper import name
import timm
from timm.models import create_model
assert not any(n.startswith("pliant.train") for n in sys.modules)
print(sys.argv[1:], type(create_model(name, layers=(2, 1, 1)).layer1[1]).__name__)
print(__name__, __file__ == sys.argv[0], "resnet50_mod" in timm.list_models())
"""


def run(*arguments, **options):
    command = [sys.executable, "-m", "pliant.timm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_a_script_of_timm_finds_the_networks(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text('name = "resnet20_cifar_mod"\n')
    done = run(tmp_path / "train.py", "DATA", "--model", "x")
    assert done.stdout.splitlines() == ["['DATA', '--model', 'x'] MoDBlock", "__main__ True True"], done


def test_what_is_no_script_is_told():
    for arguments in ((), ("nowhere.py",)):
        done = run(*arguments)
        assert done.returncode == 1
        assert "name a script and its arguments: python -m pliant.timm train.py ..." in done.stderr
