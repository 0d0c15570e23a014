# One virtual environment in .venv, made with pip alone. `make` lists the targets.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

# Metaflow and torchrun start further Pythons; they must be this environment's.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python

.DEFAULT_GOAL := help
.PHONY: help install demo test check format golden bench-docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install this project with its tools; does nothing when up to date

# DeepSpeed comes as source and imports torch and numpy to build itself, so those are installed first and builds are
# not isolated from them.
$(INSTALLED): pyproject.toml constraints.txt
	@python='$(PYTHON)'; [ -n "$$python" ] && $$python -c '$(SUPPORTED)' || { \
		echo "Python 3.11, 3.12 or 3.13 is needed; found '$${python:-none}' $$($${python:-python3} --version 2>&1)." \
		"Name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): about 1.5 GB of downloads the first time"
	$(PIP) torch numpy setuptools wheel ninja hatchling editables
	$(PIP) --no-build-isolation -e '.[demo,dev]'
	@touch $@

demo: $(INSTALLED) ## from video files to a served video, on this machine
	$(RUN) -m flows.demo

# Two at a time, a file a process, so that what a file's tests share is made once.
test: $(INSTALLED) ## the tests that need no GPU and no cluster
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED) ## format, lint, types, import layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## format, and mend what ruff can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

golden: $(INSTALLED) ## rewrite tests/golden from what the code says now; read the diff
	$(RUN) -m pytest -q tests/test_golden.py --rewrite-golden

bench-docs: $(INSTALLED) ## write docs/benchmarks.md from benchmarks/results
	$(RUN) -m benchmarks.docs

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
