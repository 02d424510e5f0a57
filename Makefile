# `make demo` and `make test` need Python 3.11 or 3.12 with pip, and nothing else.
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
FOLDERS := ir compiler targets runtime models benchmarks
PROMPT ?= def read_lines(path):

.DEFAULT_GOAL := help
.PHONY: help install demo-artifact demo test lint ruff mypy contracts docs check-docs unit interpret thin slow clean

help:
	@echo "make demo   install into $(VENV), compile the demo model for this CPU, generate text"
	@echo "make test   the same, then lint, type check, import contracts and tests"
	@echo "make slow   the tests that take minutes"
	@echo "make lint | unit | interpret | thin   parts of 'make test'"
	@echo "make docs   write the generated pages again; make clean   remove what was built"

$(INSTALLED): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv found: set PYTHON=/path/to/python"; exit 1; }
	@echo "==> installing into $(VENV) with $(PYTHON) (torch and tvm: a minute or more)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq -e '.[compile,test]'
	@touch $@

install: $(INSTALLED)

demo-artifact: $(INSTALLED)
	@echo "==> compiling models/demo for this CPU into build/demo"
	@$(BIN)/inferloom compile models/demo --chip cpu --dtype bf16 -o build/demo --force

demo: demo-artifact
	@echo "==> generating from: $(PROMPT)"
	@$(BIN)/inferloom run build/demo "$(PROMPT)" --max-tokens 64 --temperature 0 --stats

test: demo lint unit interpret thin

# mypy and import-linter read files, not import hooks: show them the package as one tree.
build/tree: $(INSTALLED)
	@rm -rf $@ && mkdir -p $@/inferloom
	@ln -s $(CURDIR)/inferloom/* $(foreach f,$(FOLDERS),$(CURDIR)/$(f)) $@/inferloom/

lint: $(INSTALLED)
	@rm -rf build/tree && $(MAKE) --no-print-directory build/tree
	@$(MAKE) --no-print-directory -k ruff mypy contracts check-docs

ruff:
	@echo "==> ruff"; $(BIN)/ruff check --quiet --output-format concise .

mypy:
	@echo "==> mypy"; MYPYPATH=build/tree $(BIN)/mypy --no-error-summary --cache-dir build/mypy -p inferloom

contracts:
	@echo "==> import contracts"; cd build/tree && $(abspath $(BIN))/lint-imports --no-cache \
		--config $(CURDIR)/pyproject.toml > ../contracts.txt || { cat ../contracts.txt; exit 1; }

docs: $(INSTALLED)
	@$(BIN)/python -m inferloom.ir.docs docs/ops.md
	@$(BIN)/python -m inferloom.compiler.architectures docs/models.md
	@$(BIN)/python -m inferloom.targets.docs docs/targets.md

check-docs: $(INSTALLED)
	@echo "==> generated docs"; $(BIN)/python -m inferloom.ir.docs --check docs/ops.md \
		&& $(BIN)/python -m inferloom.compiler.architectures --check docs/models.md \
		&& $(BIN)/python -m inferloom.targets.docs --check docs/targets.md

unit slow: export XDG_CACHE_HOME := $(CURDIR)/build/cache
unit: $(INSTALLED)
	@echo "==> tests"; $(BIN)/pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu"

# GPU kernels in Triton's interpreter, which needs processes of its own.
interpret: export TRITON_INTERPRET := 1
interpret: $(INSTALLED)
	@echo "==> GPU kernels in the interpreter"; $(BIN)/pytest -q -n $(JOBS) -m "not slow" tests/interpreter

# The base install in an environment of its own: no compiler, no torch; it loads and generates.
thin: demo-artifact
	@echo "==> thin runtime: base install only"
	@rm -rf build/thin build/lib build/bdist.* && $(PYTHON) -m venv build/thin
	@build/thin/bin/python -m pip --disable-pip-version-check install -qq .
	@rm -rf build/lib build/bdist.*
	@cd build && thin/bin/inferloom run demo "import os" --max-tokens 8 --temperature 0

slow: demo-artifact
	@$(BIN)/pytest -q -n $(JOBS) --dist worksteal -m "slow and not gpu"
	@TRITON_INTERPRET=1 $(BIN)/pytest -q -n $(JOBS) -m slow tests/interpreter

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
