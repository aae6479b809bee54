# Two commands do everything on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo
WORLD := data/demo
SHELL := /bin/bash -o pipefail
export PYTHONUNBUFFERED = 1

# Threads that wait must not spin: the data loader needs the core.
export OMP_WAIT_POLICY = PASSIVE

# The demo's knobs: `make demo ITERS=2000 SEED=1`.
ITERS ?= 500
SEED ?= 0

.PHONY: help setup demo test test-notebooks test-python test-gpu measure export figures lab wheel clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: ## create .venv and install everything (resumable; reruns skip what is done)
	@$(PYTHON) .ci/install.py

demo: setup ## synthetic world, train AQR, evaluate with the nuScenes metric, print the table, write the figures
	@if [ -d $(DEMO)/train ]; then echo "removing the training of an earlier demo, $(DEMO)/train"; rm -rf $(DEMO)/train; fi
	@mkdir -p $(DEMO)/untrained $(DEMO)/train $(DEMO)/eval
	@echo "[1/5] synthetic world -> $(WORLD)"
	@$(BIN)/python -m cmtaqr.data.world $(WORLD) --keyframes 40 --sweeps 0 --image-size 400 225 --radius 25 --lidar-range 40 --annotation-range 30 --seed 0
	@$(BIN)/python -m cmtaqr.data.nuscenes $(WORLD) --no-database
	@echo "[2/5] the untrained model's figure -> $(DEMO)/untrained"
	@$(BIN)/papermill nbs/eval.ipynb $(DEMO)/untrained/eval.ipynb -p data_root $(WORLD) -p seed $(SEED) -p untrained True
	@echo "[3/5] train AQR, $(ITERS) iterations -> $(DEMO)/train"
	@$(BIN)/papermill nbs/train.ipynb $(DEMO)/train/train.ipynb --log-output -p data_root $(WORLD) -p seed $(SEED) -p max_iters $(ITERS)
	@echo "[4/5] evaluate -> $(DEMO)/eval"
	@$(BIN)/papermill nbs/eval.ipynb $(DEMO)/eval/eval.ipynb -p data_root $(WORLD) -p seed $(SEED) -p checkpoint $(DEMO)/train -p score_threshold 0.25
	@echo "[5/5] nuScenes metrics on the validation scenes; figures in $(DEMO)/train/figures and $(DEMO)/eval/figures"
	@$(BIN)/python -m cmtaqr.engine.compare untrained=$(DEMO)/untrained trained=$(DEMO)/eval --out $(DEMO)/result.json

test: setup test-notebooks test-python ## all tests: notebooks, then pytest (GPU tests skip, saying so, without a GPU)

test-notebooks: setup ## only the notebooks
	@$(BIN)/python .ci/check.py
	@# one process a notebook: what one defines must not reach the next
	@ls nbs/*.ipynb | OMP_NUM_THREADS=1 xargs -P 2 -I{} $(BIN)/nbdev_test --n_workers 1 --do_print --path {}

test-python: setup ## only pytest
	@# two workers, one file each: what a file's tests prepare is prepared once
	@$(BIN)/python -m pytest -q -rs --durations=10 -n 2 --dist loadfile

test-gpu: setup ## only the tests that need a GPU
	@$(BIN)/python -m pytest -q -rs -m gpu

# `make measure RESULTS=outputs/measured NPROC="1 2 4 8"` leaves the committed files alone.
RESULTS ?= nbs/results
NPROC ?= 1 2 4

measure: setup ## measure anew, on this machine's GPUs, the times and memory in nbs/results
	@mkdir -p $(RESULTS)
	@$(BIN)/python -m cmtaqr.attention.benchmark --out $(RESULTS)/attention.json
	@$(BIN)/python -m cmtaqr.attention.window_benchmark --json $(RESULTS)/window.json
	@$(BIN)/python -m cmtaqr.windows_benchmark --json $(RESULTS)/windows.json
	@$(BIN)/python -m cmtaqr.engine.speed --out $(RESULTS)/speed.json
	@$(BIN)/python -m cmtaqr.engine.overhead --out $(RESULTS)/instruments.json
	@$(BIN)/python -m cmtaqr.engine.train_speed --json $(RESULTS)/training.json
	@$(BIN)/python -m cmtaqr.engine.scaling --nproc $(NPROC) --json $(RESULTS)/scaling.json
	@$(BIN)/python -m cmtaqr.engine.loading --training $(RESULTS)/training.json --json $(RESULTS)/loading.json

export: setup ## notebooks -> package, cleaned notebooks, README
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python .ci/check.py --write-readme

figures: setup ## redraw the README's figures and nbs/results/demo.json from the last `make demo`
	@$(BIN)/python .ci/figures.py

lab: setup ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

wheel: setup ## build dist/cmtaqr-*.whl
	@$(BIN)/python -m pip wheel . --no-deps -w dist

clean: ## remove the environment, generated data and outputs
	rm -rf .venv build dist *.egg-info data/* outputs/*; git checkout -q data outputs
