# Everything runs in .venv, which `make setup` makes from any Python 3.10 or newer:
# `make setup PYTHON=python3.12` names one. `make gpu` alone uses the Python at hand.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
DOCS ?= .venv-docs
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST := -m "not slow and not gpu"
# Tests run on one thread each, so two at a time; WORKERS=8 where there are more cores.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal
# What make gpu times; with one of them, a loan of a few minutes is enough.
GPU_SUITES ?= steps mod condconv forms
# Networks that train at a time on one GPU, and tests that run, a core each.
PROCESSES ?= 8
export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart lint check test test-all test-lowest docs bench gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv and install pliant into it, versions from constraints.txt

# $(call check_python,NAME) stops with one clear sentence where NAME cannot make a .venv.
define check_python
@command -v $(1) >/dev/null || { echo "There is no $(1) here; name a Python of 3.10 or newer, as in: make setup PYTHON=python3.12" >&2; exit 1; }
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "pliant needs Python 3.10 or newer, and $(1) is `$(1) -V 2>&1`; name another, as in: make setup PYTHON=python3.12" >&2; exit 1; }
@$(1) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(1) cannot make virtual environments: install its venv package (Debian and Ubuntu: python3-venv)" >&2; exit 1; }
endef

$(STAMP): pyproject.toml constraints.txt
	$(call check_python,$(PYTHON))
	@echo "Installing into $(VENV): about 3 GB, most of it torch, and a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

quickstart: setup ## train plain networks and those of all three methods on real images, five minutes
	$(BIN)/python -m research quickstart

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: setup ## ruff, the doctests and the tests of one file or folder: make check FILE=src/pliant/surgery.py
	@test -n "$(FILE)" || { echo "name the file or folder to check, as in: make check FILE=src/pliant/surgery.py" >&2; exit 2; }
	$(BIN)/python tests/check.py $(FILE)

test: lint ## lint and the fast tests, doctests included
	$(BIN)/python -m pytest $(FAST) $(PARALLEL)

test-all: lint ## lint and every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" $(PARALLEL)

# The oldest versions of constraints-lowest.txt have wheels up to Python 3.12.
test-lowest: $(LOWEST)/.installed ## the fast tests on the oldest versions that pyproject.toml admits
	$(LOWEST)/bin/python -m pytest $(FAST) $(PARALLEL)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(call check_python,$(PYTHON))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { echo "the oldest versions need Python 3.10 to 3.12: make test-lowest PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -c constraints-lowest.txt pip setuptools
	$(LOWEST)/bin/python -m pip install -c constraints-lowest.txt --no-build-isolation -e '.[dev]'
	@touch $@

# The site needs neither torch nor pliant, but for the page of commands, which pliant itself writes.
docs: setup $(DOCS)/.installed ## the documentation as a site, build/site/index.html; a dead link fails
	$(BIN)/python -m typer pliant.cli utils docs --name pliant --title Commands --output docs/reference/commands.md
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build
	@echo "written: build/site/index.html"

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(call check_python,$(PYTHON))
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q -c constraints.txt pip
	$(DOCS)/bin/python -m pip install -q -c constraints.txt --group docs
	@touch $@

bench: setup ## latency and MoD tax in every engine, and training steps, on this machine's CPU: 20 minutes
	$(BIN)/python -m research bench --readme docs/mod-tax.md
	$(BIN)/python -m research bench --suite mod-bfloat16
	$(BIN)/python -m research bench --suite steps

# For a machine with a GPU and a torch of its own: no .venv, nothing is installed. Every
# step runs whatever became of the one before; the exit status tells if one failed.
gpu: export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu: ## GPU tests and timings by the Python at hand; DATA=folder of CIFAR-10 adds the experiments (PROCESSES=8 at a time)
	@failed=; step() { echo "+ $$*"; "$$@" || failed="$$failed; $$*"; }; \
	many=$$($(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(PROCESSES) --dist worksteal"); \
	step $(PYTHON) -m pytest -m gpu $$many $$(grep -rl --include='test_*.py' 'mark\.gpu' tests); \
	for suite in $(GPU_SUITES); do step $(PYTHON) -m research bench --device cuda --suite $$suite; done; \
	train() { step $(PYTHON) -m research experiment "$$@" path="$(DATA)" threads=1 workers=0 --device cuda --processes $(PROCESSES); }; \
	if [ -n "$(DATA)" ]; then train cifar10-controls --network resnet20; \
	step $(PYTHON) -m research experiment cifar10-controls --device cuda --network resnet20 --measure --engine eager; \
	train cifar10-controls --network resnet18 --network resnet50; fi; \
	if [ -n "$$failed" ]; then echo "failed:$${failed#;}" >&2; exit 1; fi

clean: ## remove what make made
	rm -rf $(VENV) $(LOWEST) $(DOCS) build runs .pytest_cache .mypy_cache .ruff_cache
