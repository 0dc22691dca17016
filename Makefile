# Everything runs in .venv, which `make setup` makes from any Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export MPLBACKEND := Agg

.PHONY: setup quickstart test test-all test-lowest lint bench gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

quickstart: setup
	$(BIN)/pliant quickstart

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: lint
	$(BIN)/python -m pytest -m "not gpu"

# The oldest versions that pyproject.toml admits, in a place of their own.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e '.[dev]'
	.venv-lowest/bin/python -m pytest -m "not slow and not gpu"

bench: setup
	$(BIN)/python -m pliant bench

# On a machine with a GPU and its own torch: no .venv, the python at hand.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu
	PYTHONPATH=src $(PYTHON) -m pliant bench --device cuda

clean:
	rm -rf $(VENV) .venv-lowest build runs .pytest_cache .mypy_cache .ruff_cache
