# Two commands do all set-up themselves: make demo, make test.
# BENCH='--data-dir DIR'  times photographs of your own in make bench.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu  picks a CPU-only torch on Linux.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LOWEST := .venv-lowest
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INDEX  := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test campaign test-lowest demo-lowest bench lint docs clean

demo: $(READY)
	$(BIN)/msvae demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest

# Thousands of damaged files, and fits killed at any moment; `make test` runs a short form of it.
campaign: $(READY)
	MSVAE_CAMPAIGN=whole $(BIN)/python -m pytest -n 0 tests/campaign

# On the lowest versions that pyproject.toml promises, in an environment of their own.
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest

demo-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/msvae demo --out runs/demo-lowest

bench: $(READY)
	$(BIN)/python -m bench $(BENCH)

lint: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY)
	$(BIN)/python docs/generate.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "msvae needs Python 3.11 or newer: set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(INDEX) --constraint constraints.txt torch
	$(PIP) install --quiet $(INDEX) --constraint constraints.txt --editable '.[dev,jpeg]'
	touch $(READY)

$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/floors.py > $(LOWEST)/floors.txt
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet $(INDEX) --constraint $(LOWEST)/floors.txt torch
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet $(INDEX) --constraint $(LOWEST)/floors.txt --editable '.[dev,jpeg]'
	touch $(LOWEST)/.ready

clean:
	rm -rf $(VENV) $(LOWEST) runs
