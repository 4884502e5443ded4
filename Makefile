# `make help` lists what there is. PYTHON=python3 uses an environment of your own instead of .venv.
VENV := .venv
PEERS := .venv-peers
PYTHON ?= $(VENV)/bin/python
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/ready,)
# the folders engine/ and kernels/ are source roots, never packages: keep them off the import path
export PYTHONSAFEPATH := 1

.PHONY: help demo test test-gpu soak fuzz lint types check format bench bench-gpu bench-peers clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: $(READY)  ## scan real photographs through a real network, and show what it found
	$(PYTHON) -m maxact demo demo

test: $(READY)  ## all tests that need no GPU
	$(PYTHON) -m pytest -m "not gpu" -n logical --maxprocesses 4 --dist loadfile

test-gpu: export PYTHONPATH := engine:kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
test-gpu: $(READY)  ## the tests that need a GPU
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py tests/test_peaks_cuda.py

soak: export PYTHONPATH := tests
soak: $(READY)  ## runs that everything happens to: SECONDS=600, SEED=0
	$(PYTHON) tests/soak.py --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0)

fuzz: $(READY)  ## hostile input, many more examples; N=1000 of each kind
	MAXACT_FUZZ=$(or $(N),1000) $(PYTHON) -m pytest $(wildcard tests/test_hostile_*.py) --timeout 7200

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
	$(PYTHON) bench/pack.py --images "$(IMAGES)"
	$(PYTHON) bench/peaks.py
	$(PYTHON) bench/fields.py
	$(PYTHON) bench/fusion.py
	$(PYTHON) bench/together.py --images "$(IMAGES)"
	$(PYTHON) bench/scale.py
	$(PYTHON) bench/memory.py --images "$(IMAGES)"
	$(PYTHON) bench/catalog.py
	$(PYTHON) bench/pooled.py --images "$(IMAGES)"
	$(PYTHON) bench/night.py --images "$(IMAGES)"
	$(PYTHON) bench/start.py
	$(PYTHON) bench/ray_driver.py

bench-gpu: export PYTHONPATH := engine:kernels:bench$(if $(PYTHONPATH),:$(PYTHONPATH))
bench-gpu: $(READY)  ## what needs a GPU; IMAGES=FOLDER, PYTHON=python3 where torch is installed already
	$(PYTHON) bench/gpu.py --images "$(IMAGES)"
	$(PYTHON) bench/peaks.py

# thingsvision pins numpy<2 and torchvision==0.15.2, so it comes without dependencies; where that fails it is left out
$(PEERS)/ready: pyproject.toml
	python3 -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,timm,bench]' zennit-crp==0.6.0
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check tensorflow torchtyping==0.1.5
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps thingsvision==2.7.3
	touch $@

bench-peers: export PYTHONPATH := bench
bench-peers: $(PEERS)/ready  ## the scan beside its peers, in an environment of their own; IMAGES=FOLDER
	$(PEERS)/bin/python bench/peers.py --photographs "$(IMAGES)"

clean:  ## remove what was built, the environment too
	rm -rf $(VENV) $(PEERS) demo bench/out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
