# `make quickstart` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The version that everything is tested with. Which build comes (CPU, or CUDA with its gigabytes) is the index's choice;
# TORCH= leaves the version to pip too.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help install fetch quickstart test test-long lint format bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first: taken as a dependency, pip would choose a build with gigabytes of CUDA.
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed ## Make a virtual environment with everything

fetch: install ## Fetch the quickstart's model alone (93 MB); tests that need it are skipped without
	$(BIN)/python -m uft_ds.examples.smollm2

quickstart: install ## Train a small real model on two CPU ranks and talk to it (about 10 minutes)
	$(BIN)/uft quickstart

test: install ## Fast tests (under 10 minutes)
	@# By file: fixtures that train a model serve all tests of theirs. In the order of tests/conftest.py, the slow first.
	$(BIN)/python -m pytest -m "not long" -n 3 --dist loadfile --no-loadscope-reorder

test-long: install ## Tests on the real small model and real data
	$(BIN)/python -m pytest -m long

lint: install ## Formatting, lint and types
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary

format: install ## Rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## Side-by-side measurements, a table each (about an hour and a half)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/loading_memory.py
	$(BIN)/python benchmarks/reference_traffic.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/determinism.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/token_logps.py
	$(BIN)/python benchmarks/data.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
