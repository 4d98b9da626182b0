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
CPP := $(shell find csrc tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu')
SOURCES := pyproject.toml setup.py constraints.txt $(CPP) $(shell find fastattn -name '*.py')

.PHONY: help venv bench bench-full readme test lint format clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '1,5s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))
	@echo "others: make venv | bench-full | readme | lint | format | clean | distclean"

venv: $(VENV)/installed

# Not -e: what is measured and tested is what pip installs. pip builds a folder again each time, and
# leaves torch and the tools alone once they are there.
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, the tools and fastattn: two to three minutes the first time"
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

# The figures of the README are those of the last full run.
readme: venv
	$(BIN)/python -m fastattn.bench.readme $(RESULTS)/full.json

# Not `python -m pytest`, which would put the sources beside this file before the installed package.
test: venv
	$(BIN)/pytest

$(VENV)/linters: constraints.txt | venv
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt ruff mypy clang-format
	@touch $@

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

distclean: clean
	rm -rf $(VENV)
