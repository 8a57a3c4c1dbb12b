# Every target sets up what it needs, from a bare clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes of one thread each: most tests are too small for two threads to help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=20
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-all check golden clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "keepshot needs Python 3.11 or 3.12: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/keepshot run

# lint, types, layers, and the tests that need no real model: under 2 minutes once installed
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --threads 2
	$(BIN)/lint-imports
	$(PYTEST) -m "not real and not slow"

# what CI runs: everything but Gemma and what is slow
test: install
	$(BIN)/ruff check .
	$(BIN)/pyright --threads 2
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

test-all: install
	KEEPSHOT_ACCEPT_LICENCE=gemma $(PYTEST)

# rewrite the golden files, with a reason in the commit message
golden: install
	$(BIN)/python -m pytest tests/golden --golden

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
