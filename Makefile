# One target for each daily act. PYTHON chooses the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python

.PHONY: setup test slow lint matrix bench cuda

setup:   ## install for development
	$(PYTHON) -m pip install -e ".[dev]"

test:    ## the test-suite
	$(PYTHON) -m pytest

slow:    ## the tests that take minutes
	$(PYTHON) -m pytest -m slow

lint:    ## style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

matrix:  ## every update rule x setting x granularity against finite differences
	$(PYTHON) tests/test_matrix.py

bench:   ## time and memory beside the plain loop and higher
	$(PYTHON) benchmarks/unrolled.py

cuda:    ## the figures of a CUDA device, in less than 8 minutes
	$(PYTHON) benchmarks/cuda.py --out docs/results/cuda.md
