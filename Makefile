# Two commands do all set-up themselves: make demo, make test.
# BENCH='--data-dir DIR'  times photographs of your own in make bench.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu  picks a CPU-only torch on Linux.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INDEX  := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test bench lint docs clean

demo: $(READY)
	$(BIN)/msvae demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python -m bench $(BENCH)

lint: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY)
	$(BIN)/python docs/generate.py

$(READY): pyproject.toml constraints.txt hatch_build.py src/msvae/kernels.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "msvae needs Python 3.11 or newer: set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(INDEX) --constraint constraints.txt torch
	$(PIP) install --quiet $(INDEX) --constraint constraints.txt --editable '.[dev,jpeg]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs
