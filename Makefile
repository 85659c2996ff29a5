# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

# Two runtimes share two cores: more threads than cores only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.PHONY: setup demo test tour campaign fault-campaign lint format fixtures noise clean

setup: $(SETUP)

# torch first and by itself: the pinned version is the CPU build, and nothing after it asks for more.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(SETUP)
	rm -rf demo
	$(BIN)/surgery demo --output demo

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not campaign"

# The long runs: every write-side system call met by a kill, thousands of damaged headers.
campaign: $(SETUP)
	$(BIN)/python -m pytest -m campaign

# Finds one of each kind on the fixtures and puts it through the four corners; about ten minutes.
tour: $(SETUP)
	rm -rf build/tour
	$(BIN)/python tools/tour_finds.py --output build/tour

# Every seeded fault in every model: what is caught, and how near the localisation comes. Goes on
# where a run of the same code was stopped.
fault-campaign: $(SETUP)
	$(BIN)/python tools/seed_faults.py --resume --jobs 2 --output build/faults --document docs/faults.md

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Retrains every fixture from scratch; the results are in the repository.
fixtures: $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fixtures]'
	$(BIN)/python tools/train_capitals.py
	$(BIN)/python tools/train_polyglot.py

noise: $(SETUP)
	$(BIN)/python tools/measure_noise.py

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
