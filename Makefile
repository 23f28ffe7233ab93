# One target for each daily act. PYTHON chooses the interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python
SUITE ?= targets small
OUT ?= docs/results/bench.md

.PHONY: setup test slow lint docs matrix bench solvers cuda

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

docs:    ## the site, into site/, with its notebooks run; REPO_URL=https://... leads to files outside docs/
	$(PYTHON) -m pytest -q -n 0 tests/test_site.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

matrix:  ## every update rule x setting x granularity against finite differences
	$(PYTHON) tests/test_matrix.py

bench:   ## time and memory beside the plain loop, higher and TorchOpt; SUITE=quick is over in minutes
	$(PYTHON) -m benchmarks.bench --suite $(SUITE) --out $(OUT)

solvers: ## products that each solver needs for an accurate hypergradient; DATA=folder with MNIST
	$(PYTHON) -m studies.solvers $(if $(DATA),--data $(DATA))

cuda:    ## the figures of a CUDA device, in less than 8 minutes
	$(PYTHON) -m benchmarks.on_cuda --out docs/results/cuda.md
