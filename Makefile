# `make demo` and `make test` set up all they need in .venv, from Python >= 3.11 and a package index.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= demo-out
# Tests are shared out among so many processes of one thread each; a file by itself needs none:
# .venv/bin/python -m pytest tests/training/test_loss.py
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: demo test test-all lint clean

demo: .venv/.installed
	$(BIN)/clipkit demo --out $(DEMO_OUT) --overwrite

test: .venv/.installed-test
	$(PYTEST) -m "not slow"

test-all: .venv/.installed-test
	$(PYTEST)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build dist *.egg-info $(DEMO_OUT)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "clipkit needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml setup.cfg | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

.venv/.installed-dev: .venv/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev]'
	touch $@
