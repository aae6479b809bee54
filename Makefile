# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
WORLD := data/demo
SHELL := /bin/bash -o pipefail
export PYTHONUNBUFFERED = 1

# The demo's knobs: `make demo DEMO_ITERS=2000 PRESET=aggressive`.
DEMO_ITERS ?= 400
SEED ?= 0
PRESET ?= conservative

.PHONY: help setup demo test test-notebooks test-python test-gpu export readme lab wheel clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: ## create .venv and install everything (resumable; reruns skip what is done)
	@$(PYTHON) .ci/install.py

demo: setup ## synthetic world, train AQR, evaluate with the nuScenes metric, print the table, write the figures
	@$(BIN)/python .ci/demo.py --world $(WORLD) --out $(DEMO) --iters $(DEMO_ITERS) --seed $(SEED) --preset $(PRESET)

test: setup test-notebooks test-python ## all tests: notebooks, then pytest (GPU tests skip, saying so, without a GPU)

test-notebooks: setup
	@$(BIN)/python .ci/check.py
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing --do_print

test-python: setup
	@$(BIN)/python -m pytest -q -rs --durations=10

test-gpu: setup ## only the tests that need a GPU
	@$(BIN)/python -m pytest -q -rs -m gpu

export: setup ## notebooks -> package, cleaned notebooks, README
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python .ci/check.py --write-readme

lab: setup ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

wheel: setup ## build dist/cmtaqr-*.whl
	@$(BIN)/python -m pip wheel . --no-deps -w dist

clean: ## remove the environment, generated data and outputs
	rm -rf .venv build dist *.egg-info data/* outputs/*; git checkout -q data outputs
