# Every target sets up .venv by itself; the machine needs only make and a Python 3.11 or newer with pip.
#
#   make demo     a real swarm (bootstrap, aggregator, four peers) trains a real model on this machine
#   make check    format, lint, types and the fast tests: run it before every commit
#   make test     the whole test suite
#   make fix      let ruff format and repair what it can
#   make fuzz     a million mutated sections under the sanitizers, then packets and updates for four minutes
#   make chaos    kill, stop, slow and cut off real processes for half an hour, and print figures
#   make docs     build the documentation's site into build/site
#   make proto    regenerate peer/net/pb from proto/swarm.proto
#   make vectors  regenerate protocol/vectors from protocol/cases; `make lint` fails when they differ
#   make ci       everything that CI runs
#   make venv     only set up .venv
#   make clean    remove what the tools left behind (not .venv, not runs/)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --no-input
# The stamps say that .venv holds what pyproject.toml asks for, so an up-to-date target starts at once.
DEV := .venv/.stamp-dev
HF := .venv/.stamp-hf
# Many tests wait for the timers of the processes they start, so more run at once than there are cores.
PYTEST := $(PY) -m pytest -n 4 --dist loadfile
# Arguments for the demo, for example: make demo ARGS="--peers 3"
ARGS :=

.PHONY: help venv demo check lint test fix fuzz chaos docs proto vectors ci clean

help:
	@sed -n 's/^#   //p' Makefile

venv: $(DEV)

# A shim may exist and still refuse to run, and Debian ships python3 without ensurepip: so each candidate is tried.
$(DEV): pyproject.toml setup.py peer/core/kernels/kernels.cpp
	@if ! $(PY) -c '' 2>/dev/null; then \
	  found=; \
	  for candidate in python3 python3.13 python3.12 python3.11; do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      found=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'error: found no Python 3.11 or newer that can make a virtual environment.' >&2; \
	    echo '  try: sudo apt install python3 python3-venv python3-pip   (or brew install python@3.12)' >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up .venv with $$($$found --version); PyTorch and the rest are downloaded once."; \
	  rm -rf .venv; \
	  $$found -m venv .venv; \
	fi
	$(PIP) --editable '.[dev]'
	@touch $@

$(HF): $(DEV)
	$(PIP) --editable '.[dev,hf]'
	@touch $@

demo: $(DEV)
	.venv/bin/sparseloco-peer demo $(ARGS)

lint: $(DEV)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m protocol.make_vectors --check

check: lint
	$(PYTEST) -q -m 'not slow and not hf'

test: $(DEV)
	$(PYTEST) -m 'not hf'

fix: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Builds its own program, so that what serves is never built with sanitizers.
fuzz: $(DEV)
	$(PY) -m tests.core.kernels.fuzz

chaos: $(DEV)
	nice $(PY) -m tests.chaos.long

# mkdocs' own notice about its future is not about this site.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# The mapping makes the generated code a part of the package peer.net.pb; tests/test_generated.py does the same.
proto: $(DEV)
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m grpc_tools.protoc -I peer/net/pb=proto \
	  --python_out=. --mypy_out=. peer/net/pb/swarm.proto

vectors: $(DEV)
	$(PY) -m protocol.make_vectors

# The tests come last, so that their summary ends the log.
ci: $(HF)
	$(MAKE) lint
	$(MAKE) docs
	$(MAKE) demo
	$(PYTEST)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
