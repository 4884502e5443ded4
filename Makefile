# `make help` lists what there is. PYTHON=python3 uses an environment of your own instead of .venv.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/ready,)
# the folders engine/ and kernels/ are source roots, never packages: keep them off the import path
export PYTHONSAFEPATH := 1

.PHONY: help demo test test-gpu lint types check format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: $(READY)  ## scan real photographs through a real network, and show what it found
	$(PYTHON) -m maxact.cli demo demo

test: $(READY)  ## all tests that need no GPU
	$(PYTHON) -m pytest -m "not gpu"

test-gpu: $(READY)  ## the tests that need a GPU
	$(PYTHON) -m pytest -m gpu

lint: $(READY)  ## style, formatting and the direction of imports
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

types: $(READY)  ## static types
	$(PYTHON) -m mypy

check: lint types  ## lint and types

format: $(READY)  ## bring the code into shape
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: export PYTHONPATH := bench
bench: $(READY)  ## all benchmarks; IMAGES=FOLDER of photographs of your own
	$(PYTHON) bench/scan.py --images "$(IMAGES)"
	$(PYTHON) bench/heaps.py
	$(PYTHON) bench/deconv.py --images "$(IMAGES)"
	$(PYTHON) bench/gallery.py
	$(PYTHON) bench/decode.py --images "$(IMAGES)"
	$(PYTHON) bench/memory.py --images "$(IMAGES)"
	$(PYTHON) bench/catalog.py
	$(PYTHON) bench/start.py

clean:  ## remove what was built, the environment too
	rm -rf $(VENV) demo bench/out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
