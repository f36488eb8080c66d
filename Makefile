# Each target works alone on a fresh machine with Python 3.11 or newer; nothing but this folder and .venv is touched.

PYTHON ?= python3
VENV ?= .venv
EXPORT_PIP := PIP_CONSTRAINT=$(CURDIR)/constraints/dev.txt PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: demo test lint types bench clean

demo: $(VENV)/.demo
	$(VENV)/bin/offramp demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q -m "not slow"
	$(VENV)/bin/python -m pytest -q -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

bench: $(VENV)/.dev
	for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python $$script || exit 1; done

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache

# The stamps say which extras are installed; a changed pyproject.toml installs anew.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints/dev.txt | $(VENV)/bin/python
	$(EXPORT_PIP) $(VENV)/bin/python -m pip install --quiet -e '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
