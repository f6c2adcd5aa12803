# `make quickstart` and `make test` set up everything they need in .venv; nothing else has to be done before.
# A second run installs nothing, until pyproject.toml or constraints.txt changes. Other Python: make PYTHON=python3.12 test

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

# Stamps: what `limbeck` needs to run, and what its tests need besides.
RUNTIME := .venv/.limbeck-runtime
DEV := .venv/.limbeck-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart test lint slow real mutate bench clean

help:
	@echo 'make quickstart   a teacher distilled into a small student four ways, side by side: table and report.html'
	@echo 'make test         ruff, pyright, import-linter, pytest: under 10 minutes on 2 cores'
	@echo 'make slow         the tests that take longer'
	@echo 'make real         the tests on real models (they need ../shared)'
	@echo 'make mutate       breaks the code in the ways of tests/mutations.toml: a test must notice each'
	@echo 'make bench        peak memory and time of the chunked divergence at a real vocabulary'
	@echo 'make clean        removes .venv and caches'

# python3 -m venv of Debian needs the package python3-venv. A folder left half made is made again.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: expected Python 3.11 or newer, found "$(PYTHON)" missing or older: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: expected Python with venv and ensurepip, found none: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv

# torch first and at its pin, so that no other package's range chooses the build. hatchling comes from the constraints
# too, hence no isolated build.
$(RUNTIME): $(INPUTS) | $(BIN)/python
	@echo 'make: installing limbeck and what it needs into .venv (minutes, the first time)'
	$(PIP) install -qq -c constraints.txt torch
	$(PIP) install -qq -c constraints.txt hatchling editables
	$(PIP) install -qq -c constraints.txt --no-build-isolation -e .
	@touch $@

$(DEV): $(RUNTIME)
	@echo 'make: installing what the tests need into .venv'
	$(PIP) install -qq -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

quickstart: $(RUNTIME)
	$(BIN)/limbeck quickstart

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

# The linters come first: pytest's summary is the last thing printed. -rs names the tests that were not run, and why.
test: lint
	$(BIN)/python -m pytest -v -rs --timeout=300

slow: $(DEV)
	$(BIN)/python -m pytest -v -rs --timeout=3600 -m 'slow and not real'

real: $(DEV)
	$(BIN)/python -m pytest -v -rs --timeout=3600 -m real

mutate: $(DEV)
	$(BIN)/python tests/mutate.py

bench: $(RUNTIME)
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache build dist
