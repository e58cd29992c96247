# `make demo` and the other targets need python3 (3.10 or newer), pip and make; they set up the rest in $(VENV), once, and
# again when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# TensorFlow's C++ side: errors only, and sums that do not differ from run to run.
export TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_ENABLE_ONEDNN_OPTS ?= 0

# The theme advertises its successor at each build.
export NO_MKDOCS_2_WARNING ?= 1

.DEFAULT_GOAL := help
# How long `make soak` attacks.
SOAK_SECONDS ?= 3600

# The build of PyTorch for the CPU alone, as the development tools have it: a newer one may bring gigabytes of CUDA along.
TORCH ?= torch==2.13.0

.PHONY: help demo demo-torch demo-jax demo-replicas test soak lint format bench docs docs-serve clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-to-run  ## Train on real digits, be killed half-way, lose a bit, resume: the same model (TensorFlow)
	@$(BIN)/python examples/demo.py

demo-torch: $(VENV)/.ready-for-torch  ## The same with PyTorch
	@$(BIN)/python examples/demo.py --engine=torch

demo-jax: $(VENV)/.ready-for-jax  ## The same with JAX
	@$(BIN)/python examples/demo.py --engine=jax

demo-replicas: $(VENV)/.ready-to-run  ## Train on four processes, kill three of them, see them come back
	@$(BIN)/python examples/demo_replicas.py

# Many tests wait for processes: three of them fill two processors. The order is that of tests/conftest.py.
test: lint  ## The whole gate: format, lint, types, imports, tests
	@$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

soak: $(VENV)/.ready-to-develop  ## The tests that take long; then runs killed, filled and damaged at random for SOAK_SECONDS
	@$(BIN)/python -m pytest -m soak --numprocesses=3 --dist=loadfile --no-loadscope-reorder
	@$(BIN)/python tests/soak/soak.py --seconds $(SOAK_SECONDS)

lint: $(VENV)/.ready-to-develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready-to-develop  ## Format the code and repair what the linter can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.ready-to-run  ## Measure against a bare session and TensorFlow's own supervisors
	@$(BIN)/python benchmarks/run.py

docs: $(VENV)/.ready-to-develop  ## Build the documentation into site/
	@$(BIN)/mkdocs build --strict
	@echo "Open site/index.html"

docs-serve: $(VENV)/.ready-to-develop  ## Show the documentation while you write it
	@$(BIN)/mkdocs serve

clean:  ## Remove what the other targets made, and all of runs/
	rm -rf $(VENV) runs site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship venv without ensurepip: there the pip outside puts a pip inside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "stepguard needs Python 3.10 or newer; say which with: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --disable-pip-version-check --quiet install pip --target \
	        "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; }

$(VENV)/.ready-to-run: pyproject.toml | $(BIN)/python
	@echo "Installing stepguard and TensorFlow into $(VENV): once, a few minutes, about 1.5 GB on disk"
	@$(PIP) install --editable '.[tensorflow-cpu]'
	@touch $@

$(VENV)/.ready-for-torch: pyproject.toml | $(BIN)/python
	@echo "Installing stepguard and PyTorch into $(VENV): once, a few minutes, about 1 GB on disk"
	@$(PIP) install --editable '.[torch]' '$(TORCH)'
	@touch $@

$(VENV)/.ready-for-jax: pyproject.toml | $(BIN)/python
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "JAX needs Python 3.11 or newer: make demo-jax PYTHON=python3.12 VENV=.venv/3.12" >&2; exit 1; }
	@echo "Installing stepguard, JAX and Optax into $(VENV): once, a minute, about 0.5 GB on disk"
	@$(PIP) install --editable '.[jax]' 'optax>=0.2.8'
	@touch $@

$(VENV)/.ready-to-develop: pyproject.toml | $(VENV)/.ready-to-run
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) install --editable '.[tensorflow-cpu,dev,docs]'
	@touch $@
