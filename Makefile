# make demo: train on a toybox subject and look at the result.   make test: lint and run all tests.
# Both set up .venv first; someone who has an environment uses it with VENV=path.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.s2ft-installed

.PHONY: install demo test lint format

install: $(STAMP)

$(PYTHON):
	python3 -m venv $(VENV)

$(STAMP): pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet --editable ".[test]"
	touch $(STAMP)

demo: $(STAMP)
	$(PYTHON) demo.py

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test: lint
	$(PYTHON) -m pytest

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
