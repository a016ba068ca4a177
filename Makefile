# Set-up and every job of the project. Needs make, and Python 3.11 or newer as $(PYTHON).
PYTHON ?= python3
# The versions that CI runs; empty for the newest.
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --dist loadgroup

.PHONY: run test test-engines test-lowest lint docs dist stack stack-ranks soak bench bench-gpu bench-ranks bench-serving screenshots clean

run: $(INSTALLED)  ## Train the reference job with its metrics at http://127.0.0.1:19301/metrics
	@hold=; [ ! -t 1 ] || hold=--hold; exec $(BIN)/esper ppo --episodes 10 $$hold

test: $(INSTALLED)  ## Run every test; servers and the browser are fetched first where they are missing
	$(BIN)/python -m deploy.stack.servers
	$(PYTEST) --numprocesses 2 --ignore tests/end_to_end --ignore tests/ranks
	$(PYTEST) --numprocesses 3 tests/end_to_end tests/ranks  # they wait

test-engines:  ## Run the tests of DeepSpeed and Ray Train, in a virtual environment of their own, which is made first
	$(MAKE) VENV=.venv-engines .venv-engines/.installed
	DS_BUILD_OPS=0 .venv-engines/bin/python -m pip install --quiet --constraint constraints.txt deepspeed==0.19.8 'ray[train]==2.60.0'
	OMP_WAIT_POLICY=passive .venv-engines/bin/python -m pytest tests/engines

test-lowest:  ## Run the tests with the oldest dependencies that pyproject.toml allows, all but torch
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=.venv-lowest/lowest.txt

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## Build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --quiet -c docs . build/docs
	@echo "file://$(CURDIR)/build/docs/index.html"

dist: $(INSTALLED)  ## Build the wheel and the sdist into dist/
	$(INSTALL) --group dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m pyroma --min 9 dist/*.tar.gz
	$(BIN)/python -m twine check --strict dist/*

stack: $(INSTALLED)  ## See a page arrive: a fault, Prometheus, Alertmanager and a pager, natively
	$(BIN)/python -m deploy.stack

stack-ranks: $(INSTALLED)  ## See the page of a run of two ranks, which names the one at fault; about a minute
	$(BIN)/python -m deploy.stack.ranks

soak: $(INSTALLED)  ## Place 50 bad checks at random and count the pages; about 10 minutes
	$(BIN)/python -m deploy.stack.soak --placements 50

bench: $(INSTALLED)  ## Measure the cost side by side with what people use today; about 13 minutes
	$(INSTALL) --group bench
	$(BIN)/python -m benchmarks

bench-gpu:  ## Measure the cost on an NVIDIA GPU, with the torch and Triton of $(PYTHON); about 5 minutes
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --out benchmarks

bench-ranks: $(INSTALLED)  ## Measure a check and a vote on two ranks, and simulate 10,000; about 15 minutes
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.ranks
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.rank_rows

bench-serving: $(INSTALLED)  ## Attack an exporter, and measure what its training thread feels; about 10 minutes
	$(BIN)/python -m benchmarks.serving --output benchmarks/SERVING.md

screenshots: $(INSTALLED)  ## Take the pictures of the exporter's page from real runs; about a minute
	$(BIN)/python -m tests.screenshots

clean:  ## Remove what the other targets made
	rm -rf $(VENV) .venv-engines .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --group dev --editable .
	@touch $@

%/lowest.txt: pyproject.toml constraints.txt
	@mkdir -p $(@D)
	$(PYTHON) -m tests.lowest > $@
