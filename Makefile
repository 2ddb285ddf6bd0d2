# make demo: train an agent through the freeze, with a table and a plot at the end
# make test: lint, types and tests
# make docs: the documentation, in docs/_build/html
# All make a virtual environment in VENV first, once.

PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests
WORKERS ?= 2

# One thread a process: the networks of the tests are tiny
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint type pytest coverage docs format install clean

demo: install
	$(VENV)/bin/python -m benchmarks.demo

test: lint type pytest

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

type: install
	$(VENV)/bin/mypy

pytest: install
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

coverage: install
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-report=xml

# -W: a warning is an error
docs: install
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[all,benchmarks,cluster,docs,tests]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build .coverage coverage.xml .mypy_cache .pytest_cache .ruff_cache .hypothesis
