# Everything runs in an environment of its own, with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AUDIT := .venv-audit
QUICK := --quiet --no-compile  # Python compiles what is imported; of all 22,000 files, that would take a minute
INSTALLED := $(VENV)/.installed

.PHONY: demo docs test tests check lint web bench bench-scale bench-speed check-slow format audit clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUICK) -c constraints.txt torch
	$(BIN)/python -m pip install $(QUICK) -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

demo: $(INSTALLED)  ## the main job on the built-in model
	$(BIN)/twofold compress smollm2 --keep 0.8 --calibration demo --tokens 8192 --out demo-output --overwrite

test: $(INSTALLED)  ## lint, types and the tests, side by side, since mypy takes one core
	$(MAKE) --jobs 2 lint tests

tests: $(INSTALLED)  ## the tests alone
	$(BIN)/python -m pytest -m "not slow" -n auto --dist worksteal

check: $(INSTALLED) lint  ## for the inner loop: lint, types and the tests that take under a second each
	$(BIN)/python -m pytest -q -m "not slow and not long" -n auto --dist worksteal

lint: $(INSTALLED)  ## lint and types
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

web/node_modules: web/package-lock.json
	cd web && npm ci --no-audit --no-fund
	touch web/node_modules

web: $(INSTALLED) web/node_modules  ## build the live page and test it in a browser; needs Node.js 20 and Chromium
	$(BIN)/python tests/explorer_cases.py
	cd web && npm run types && npm run unit && npm run build
	$(BIN)/python tests/explorer_cases.py --pages web/test-results
	cd web && npm run browser

format: $(INSTALLED)
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

check-slow: $(INSTALLED)  ## the longer checks on the real model
	$(BIN)/python -m pytest -m slow

bench: $(INSTALLED)  ## the figures of docs/benchmarks.md
	$(BIN)/python benchmarks/main_job.py

docs: $(INSTALLED)  ## the docs site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Needs PyPI itself, where the known weaknesses are: an index that has the packages only does not do. A package that can't be
# looked up is an error, since pip-audit would else say that nothing was found.
audit: $(INSTALLED)  ## known weaknesses of what is installed
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet pip-audit; }
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[^; ]*//' > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(AUDIT)/installed.txt

bench-scale: $(INSTALLED)  ## block by block, killed, on two processes (docs/benchmarks.md)
	$(BIN)/python benchmarks/scale.py streaming growth processes kills

bench-speed: $(INSTALLED)  ## tokens a second, prompts and loading against their bars; on an idle machine (docs/speed.md)
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) $(AUDIT) web/node_modules web/test-results build dist site demo-output bench-output .mypy_cache .pytest_cache .ruff_cache
