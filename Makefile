# Every target makes its own .venv; the second time that costs nothing.
PYTHON ?= python3
BIN := .venv/bin
ONLY ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench down lock

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

test: .venv/installed check ## Run the checks and all tests
	$(BIN)/python -m pytest

check: .venv/installed ## Lint, type-check and check the layers
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/installed ## Run the benchmarks, or those of one area: make bench ONLY=tracking
	$(BIN)/python -m tests.benchmarks $(ONLY)

lock: .venv/installed ## Write constraints.txt from what is installed in .venv
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | sort -f > constraints.txt
