# make setup   a virtual environment in .venv with everything the other targets need
# make test    the default tests (2 cores: minutes)
# make demo    fine-tune SmolLM2-135M, all of its weights, and look at the result
# Only Python 3.10 or newer (3.11 is what we test) and this folder are needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
PY     := $(VENV)/bin/python

# Two threads on two busy cores are ten times slower; a shared extension cache breaks.
export OMP_NUM_THREADS        ?= 1
export TORCH_EXTENSIONS_DIR   ?= $(abspath $(VENV))/torch_extensions
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup matrix test test-slow test-kernels test-hosts interop test-gpu demo demo-short lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Three workers on two cores: many tests wait for disks and other processes.
test: setup
	$(PY) -m pytest -q -n 3 --dist loadfile

test-slow: setup
	$(PY) -m pytest -q -m slow

# The default tests with the kernels of other processors: what asks for bits must get them there too. Each of six rows
# takes as long as `make test`; ROWS="..." for some.
test-kernels: setup
	$(PY) -m tests.kernels $(if $(ROWS),--rows "$(ROWS)")

# HiFT inside other programs, at their own pins (needs the network once).
test-hosts: setup
	for file in tests/hosts/*.txt; do \
	  $(PY) -m pip install --quiet --no-deps --target .hosts/$$(basename $$file .txt) -r $$file || exit 1; done
	$(PY) -m pytest -q -m slow tests/hosts

# An exported checkpoint in llama.cpp, CTranslate2 and lm-eval: transformers' log-probabilities (needs the network once).
interop: setup
	$(PY) -m pip install --quiet --no-deps --target .interop -r tests/interop/requirements.txt
	$(PY) -m pytest -q -s -m slow tests/interop

# Engine and Trainer with older and newer versions of what they stand on (docs/versions.md). Hours; ROWS="..." for some.
matrix: setup
	$(PY) -m tests.versions $(ROWS)

test-gpu: setup
	$(PY) -m pytest -q -m gpu tests/gpu

demo: setup
	$(PY) -m examples.demo

demo-short: setup
	$(PY) -m examples.demo --short

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) demo build dist *.egg-info
