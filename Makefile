# make demo: train on a toybox subject and look at the result.   make test: lint and run the tests, in minutes.
# make test-slow, test-all: the slow tests, too, some of which want a Chromium and npm.
# make test-long: hours of fuzzing, killing and crowds (tests/long).
# make docs: build the documentation into site/.
# All set up .venv first; someone who has an environment uses it with VENV=path.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.s2ft-installed

AXE := node_modules/axe-core/axe.min.js

PYTEST := $(PYTHON) -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

.PHONY: install demo test test-slow test-all test-long docs lint format

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
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) $(AXE)
	$(PYTEST) -m slow $(SLOW)

test-all: lint $(AXE)
	$(PYTEST)

test-long: $(STAMP)
	$(PYTHON) -m tests.fuzz_adapter_file --files 1_000_000 --attach 0.1
	$(PYTHON) -m pip install --quiet atheris
	$(PYTHON) -m tests.long.fuzz_coverage -max_total_time=600
	$(PYTHON) -m tests.long.killing --moments 200
	$(PYTHON) -m tests.long.full_disk --moments 40
	$(PYTHON) -m tests.long.processes
	$(PYTHON) -m tests.long.endpoints --examples 200
	$(PYTHON) -m tests.long.clients --clients 16 --minutes 10

docs: $(STAMP)
	$(PYTHON) -m pip install --quiet --editable ".[docs]"
	$(PYTHON) -m mkdocs build --strict

# The rules that the app's pages are looked at by; without npm or a Chromium those tests skip.
$(AXE):
	command -v npm > /dev/null && npm install --silent --no-save axe-core || echo "npm is not here: no accessibility tests"

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
