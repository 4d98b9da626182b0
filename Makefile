# make bench   everything that shows what this library does here: install, check, benchmark, train
# make test    install, run the tests
#
# Both set up a virtual environment of their own in $(VENV). PYTHON chooses the interpreter, and
# PIP_FLAGS passes options to pip, for instance an index that has the CPU build of torch.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
RESULTS := benchmarks/results
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc fastattn -name '*.cpp' -o -name '*.h' -o -name '*.py')

.PHONY: help venv bench bench-full test lint format clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '1,5s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))
	@echo "others: make venv | bench-full | lint | format | clean | distclean"

venv: $(VENV)/installed

# The pins come first and on their own, so that a change of our sources does not install them again.
$(VENV)/pins: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	@echo "installing torch and the tools (about 90 s)"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -r constraints.txt
	@touch $@

# Not -e: what is measured and tested is what pip installs.
$(VENV)/installed: $(VENV)/pins $(SOURCES)
	@echo "building and installing fastattn"
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt '.[test]'
	@touch $@

bench: venv
	$(BIN)/fastattn info
	$(BIN)/fastattn check
	$(BIN)/fastattn bench --quick --json $(RESULTS)/bench.json --html $(RESULTS)/report.html
	$(BIN)/python examples/train_lm.py --quick --out $(RESULTS)/train
	@echo
	@echo "open $(RESULTS)/report.html; the figures are in $(RESULTS)/bench.json, the training in $(RESULTS)/train"

bench-full: venv
	$(BIN)/fastattn bench --full --json $(RESULTS)/full.json --html $(RESULTS)/full.html

# Not `python -m pytest`, which would put the sources beside this file before the installed package.
test: venv
	$(BIN)/pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

distclean: clean
	rm -rf $(VENV)
