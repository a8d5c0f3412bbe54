# Each target builds .venv when it is missing or pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEEDS ?= 5

.PHONY: help install reproduce-table1 reproduce-table2 reproduce-swapped-teacher test test-long test-lowest lint format bench clean

help:
	@echo "make reproduce-table2           Supervised, NoisyStudent, Reduced MPL on digits, $(SEEDS) seeds"
	@echo "make reproduce-table1           eight methods alone, six also with full MPL on top"
	@echo "make reproduce-swapped-teacher  does the feedback act? with controls"
	@echo "make test | test-long | test-lowest | lint | format | bench | clean"

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --editable ".[dev]"
	@touch $@

reproduce-table1: $(STAMP)
	$(BIN)/mpl reproduce table1 --seeds $(SEEDS)

reproduce-table2: $(STAMP)
	$(BIN)/mpl reproduce table2 --seeds $(SEEDS)

reproduce-swapped-teacher: $(STAMP)
	$(BIN)/mpl reproduce swapped-teacher --seeds $(SEEDS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# With the lowest version of every dependency that pyproject.toml allows, in a .venv-lowest of its own
test-lowest: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-lowest
	$(BIN)/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m long

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,bench]"
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.select
	$(BIN)/python -m benchmarks.score
	$(BIN)/python -m benchmarks.predictions
	$(BIN)/python -m benchmarks.readers
	$(BIN)/python -m benchmarks.targets
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.train_mpl --batches 16 --rounds 3
	$(BIN)/python -m benchmarks.reduced_vs_full --batches 32 --rounds 3
	$(BIN)/python -m benchmarks.plan --rounds 3

clean:
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
