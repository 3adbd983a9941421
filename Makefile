# `make quickstart` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The version that everything is tested with. Which build comes (CPU, or CUDA with its gigabytes) is the index's choice;
# TORCH= leaves the version to pip too.
TORCH ?= torch==2.13.0
# The oldest versions that pyproject.toml allows. torch 2.10 has no CPU build on the package index, its CUDA one takes
# 7 GB: `make test-lowest LOWEST_TORCH=torch==2.10.0` where that is no hindrance.
LOWEST_VENV ?= $(VENV)-lowest
LOWEST_TORCH ?= $(TORCH)
# Tests keep bytecode, also where the environment turns it off: three workers would compile all tests each time they
# start, and each of the hundreds of programs that they run the whole package.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
# The main job once: recipes, kernels against the naive ones, gradients, train, kill and resume, convert.
SPINE := tests/recipe/test_recipe.py tests/kernels/test_token_logps.py $(addprefix tests/distributed/,\
	test_training_run.py::test_a_run_leaves_everything_that_belongs_to_it \
	test_training_run.py::test_metrics_have_the_documented_names_and_sane_values \
	test_training_run.py::test_the_merged_model_is_the_adapter_on_the_base \
	test_gradient_scale.py::test_gradient_does_not_depend_on_world_size \
	test_gradient_scale.py::test_a_nan_on_one_rank_skips_the_step_on_all \
	test_resume.py::test_a_killed_run_goes_on_bit_for_bit)

.DEFAULT_GOAL := help
.PHONY: help install fetch quickstart online test test-long test-lowest install-lowest lint docs format bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	@echo "$(VENV): PyTorch, then what pyproject.toml asks for; minutes in silence, gigabytes with CUDA"
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

online: install ## The quickstart's model learns from its own answers, graded by code (about 10 minutes)
	$(BIN)/uft quickstart --online

test: install ## Fast tests: every unit and property once (about six minutes)
	@# By file: fixtures that train a model serve all tests of theirs. In the order of tests/suites.py, the slow first.
	$(PYTEST) -m "not long" -n 3 --dist loadfile --no-loadscope-reorder

test-long: install ## Other variants of the same properties, the real small model, real data, batch jobs
	$(PYTEST) -m long -n 3 --dist loadfile --no-loadscope-reorder

$(LOWEST_VENV)/.installed: pyproject.toml scripts/lowest_versions.py
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(if $(LOWEST_TORCH),$(LOWEST_VENV)/bin/python -m pip install --quiet "$(LOWEST_TORCH)")
	$(PYTHON) scripts/lowest_versions.py >$(LOWEST_VENV)/lowest.txt
	$(LOWEST_VENV)/bin/python -m pip install --quiet --constraint $(LOWEST_VENV)/lowest.txt --editable . pytest hypothesis
	@touch $@

install-lowest: $(LOWEST_VENV)/.installed

test-lowest: install-lowest ## The main job with the oldest versions that pyproject.toml allows
	$(LOWEST_VENV)/bin/python -m pytest -m "not long" $(SPINE)

lint: install ## Formatting, lint, types, and the package's structure
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-cache > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }
	$(BIN)/python scripts/structure.py --check

docs: install ## Build the documentation site into build/docs; a broken link or a page without a place fails
	@# The variable turns a notice of the theme off, on what comes after MkDocs.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: install ## Rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## Side-by-side measurements, a table each (about an hour and a half)
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/loading_memory.py
	$(BIN)/python benchmarks/reference_traffic.py
	$(BIN)/python benchmarks/online_traffic.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/determinism.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/python benchmarks/token_logps.py
	$(BIN)/python benchmarks/data.py

clean: ## Remove the virtual environment, caches and the built site
	rm -rf $(VENV) $(LOWEST_VENV) build/docs .pytest_cache .mypy_cache .ruff_cache .hypothesis
