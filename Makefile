# Everything runs in an environment of its own, with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench check-slow format clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)  ## the main job on the built-in model
	$(BIN)/twofold compress smollm2 --keep 0.8 --tokens 16384 --out demo-output --overwrite

test: $(INSTALLED)  ## lint, types and the tests
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

check-slow: $(INSTALLED)  ## the longer checks on the real model
	$(BIN)/python -m pytest -m slow

bench: $(INSTALLED)  ## the figures of docs/benchmarks.md
	$(BIN)/python benchmarks/main_job.py

clean:
	rm -rf $(VENV) build dist demo-output bench-output .mypy_cache .pytest_cache .ruff_cache
