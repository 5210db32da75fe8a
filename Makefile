# `make run` and `make test` do all the set-up; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SOURCES := $(shell find cpp -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt') pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help run test test-all nightly tsan asan lint layers types clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# Built without isolation, so that a second run compiles only what changed.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.20" ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	  $(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	  $(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

run: $(VENV)/.installed ## write a story with the model that ships, inside 96 MiB
	$(BIN)/edge run story "Once upon a time" --memory 96MiB --context 512 -n 200

test: $(VENV)/.dev ## the quick tests
	$(BIN)/python -m pytest -n $(JOBS)

test-all: $(VENV)/.dev ## the slow tests too
	$(BIN)/python -m pytest -m "not nightly"

nightly: $(VENV)/.dev ## random and long tests
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -m "nightly or slow" --timeout 3600

SANITIZED = PATH="$(CURDIR)/$(BIN):$$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/python -m tests.sanitized

tsan: $(VENV)/.dev ## nightly: what threads share, under ThreadSanitizer
	$(SANITIZED) thread

asan: $(VENV)/.dev ## nightly: the same tests under the address and undefined-behaviour sanitizers
	$(SANITIZED) address,undefined

lint: $(VENV)/.dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy --strict on the public packages
	$(BIN)/mypy

layers: $(VENV)/.dev ## who may import whom
	$(BIN)/lint-imports

clean: ## remove everything that was built
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
