# Set-up and every job of the project. Needs make, and Python 3.11 or newer as $(PYTHON).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test lint clean

run: $(INSTALLED)  ## Train the reference job with its metrics at http://127.0.0.1:19301/metrics
	@hold=; [ ! -t 1 ] || hold=--hold; exec $(BIN)/esper ppo --episodes 10 $$hold

test: $(INSTALLED)  ## Run every test; servers that are missing are fetched first
	$(BIN)/python -m deploy.stack.servers
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove what the other targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	@touch $@
