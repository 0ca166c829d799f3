# Every target makes its own .venv; the second time that costs nothing.
PYTHON ?= python3
BIN := .venv/bin
ONLY ?=
ARGS ?=
PLATFORMS := tests/e2e tests/faults
REST := tests/unit tests/contract tests/http

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

# Two at a time, for two cores: the tests of whole platforms, which also wait, and all the rest one after another.
test: .venv/installed ## Run the checks and all tests (only some tests: make test ARGS=tests/unit)
ifeq ($(ARGS),)
	@mkdir -p build
	@{ $(MAKE) --no-print-directory check && $(BIN)/python -m pytest $(REST); } > build/rest.log 2>&1 & rest=$$!; \
	$(BIN)/python -m pytest $(PLATFORMS); platforms=$$?; \
	wait $$rest; rest=$$?; cat build/rest.log; \
	exit $$((platforms || rest))
else
	$(BIN)/python -m pytest $(ARGS)
endif

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
