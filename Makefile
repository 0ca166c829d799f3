# Every target makes its own .venv; the second time that costs nothing.
PYTHON ?= python3
BIN := .venv/bin
ONLY ?=
ARGS ?=
# Tests that run side by side: those of whole platforms, of which two wait most of the time, and the rest in two halves.
LANES := e2e faults stores http
FOLDERS_e2e := tests/e2e
FOLDERS_faults := tests/faults
FOLDERS_stores := tests/unit tests/contract
FOLDERS_http := tests/http

.DEFAULT_GOAL := help
.PHONY: help demo test soak check bench down lock

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed ## Start the platform, train and register a model in a pipeline, predict with it
	$(BIN)/mlplat demo

down: .venv/installed ## Stop the platform; its data stays
	$(BIN)/mlplat down

test: .venv/installed ## Run the checks and all tests (only some tests: make test ARGS=tests/unit)
ifeq ($(ARGS),)
	@$(MAKE) --no-print-directory --jobs --keep-going --output-sync=target check $(LANES:%=lane-%)
else
	$(BIN)/python -m pytest $(ARGS)
endif

lane-%: .venv/installed
	$(BIN)/python -m pytest $(FOLDERS_$*)

soak: .venv/installed ## Kill parts of a platform at work, hundreds of times (half an hour)
	$(BIN)/python -m pytest -m soak $(ARGS)

check: .venv/installed ## Lint, type-check and check the layers
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/installed ## Run the benchmarks, or those of one area: make bench ONLY=tracking
	$(BIN)/python -m tests.benchmarks $(ONLY)

lock: .venv/installed ## Write constraints.txt from what is installed in .venv
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | sort -f > constraints.txt
