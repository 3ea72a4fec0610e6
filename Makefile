# Each target works as the first command in a fresh checkout.
PYTHON ?= python3
SEED ?= 0
# First and on its own, so that no later requirement brings another build of it.
TORCH ?= torch==2.13.0
BIN := .venv/bin
RUN := outputs/quickstart$(if $(filter-out 0,$(SEED)),-seed$(SEED))

.PHONY: install test quality quickstart quickstart-compare benchmark

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[deepspeed,figures,dev]'
	touch $@

test: install
	$(BIN)/python -m pytest

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: install
	$(BIN)/python benchmarks/overhead.py
