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

# What limbeck is measured against, in an environment of its own that shares the pins. `make bench ARGS='--only step'`
BENCH := benchmarks/.venv
BENCH_PIP := $(BENCH)/bin/python -m pip --disable-pip-version-check
PEERS := 'trl==1.16.*' 'liger-kernel==0.8.*'
PEERS_STAMP := $(BENCH)/.limbeck-peers
ARGS ?=

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
	@echo 'make bench        limbeck beside trl, liger and transformers: speed and peak memory (ARGS=--help: which rows)'
	@echo 'make clean        removes .venv and caches'

# python3 -m venv of Debian needs the package python3-venv. A folder left half made is made again.
$(BIN)/python $(BENCH)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make: expected Python 3.11 or newer, found "$(PYTHON)" missing or older: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: expected Python with venv and ensurepip, found none: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(@:/bin/python=)

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

# gguf: ../shared/get-model makes its models with it.
$(PEERS_STAMP): $(INPUTS) Makefile | $(BENCH)/bin/python
	@echo 'make: installing limbeck and its peers into $(BENCH) (minutes, the first time)'
	$(BENCH_PIP) install -qq -c constraints.txt torch
	$(BENCH_PIP) install -qq -c constraints.txt hatchling editables
	$(BENCH_PIP) install -qq -c constraints.txt --no-build-isolation -e '.[gguf,serve]' $(PEERS)
	@touch $@

quickstart: $(RUNTIME)
	$(BIN)/limbeck quickstart

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

# The linters come first: pytest's summary is the last thing printed. -rs names the tests that were not run, and why.
# Two processes of one thread each, a file in one of them: most tests are too small for two threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -rs --durations=25 --timeout=300 -n 2 --dist loadfile

slow: $(DEV)
	$(BIN)/python -m pytest -v -rs --timeout=3600 -m 'slow and not real'

real: $(DEV)
	$(BIN)/python -m pytest -v -rs --timeout=3600 -m real

mutate: $(DEV)
	$(BIN)/python tests/mutate.py

bench: $(PEERS_STAMP)
	$(BENCH)/bin/python -m benchmarks.run $(ARGS)

clean:
	rm -rf .venv $(BENCH) .pytest_cache .ruff_cache .import_linter_cache build dist
